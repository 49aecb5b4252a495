"""`optq eval` of several models and texts, beside a dense one, and what it keeps."""

import json
import math
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import zoo

from optq import GPTQ, ModelConfig, Runner, evaluation
from optq.errors import DataError, ModelError, NumericsError, SettingError
from optq.evaluate.tasks import ZeroShot
from optq.evaluation import Evaluation
from optq.findings import FILE, Against, Completed, Findings, OnText
from optq.formats.describe import describe
from optq.model.checkpoint import Checkpoint
from optq.report import evaluated
from optq.report.found import lines_of

TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40
OTHER = "an end of it, the one that is near, is read in the order of the others then; " * 40


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    (row,) = (row for row in zoo.ROWS if row.name == "llama")
    return zoo.save(row, tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    text = folder / "text.txt"
    text.write_text(TEXT)
    made = []
    for wbits in (4, 3):
        out = folder / f"q{wbits}"
        Runner(
            ModelConfig(str(plain), "cpu"), GPTQ(wbits, 32), calib=str(text), nsamples=4, seqlen=32,
            output=out,
        ).run()  # fmt: skip
        made.append(out)
    return made


@pytest.fixture
def out(packed, tmp_path):
    """A copy of the three-bit one, with nothing beside it."""
    return Path(shutil.copytree(packed[1], tmp_path / "out", ignore=lambda *_: [FILE]))


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, content in zip(paths, (TEXT, OTHER), strict=True):
        path.write_text(content)
    return [str(path) for path in paths]


def evaluate(models, texts, against=None, **options):
    configs = [ModelConfig(str(model), "cpu") for model in models]
    dense = None if against is None else ModelConfig(str(against), "cpu")
    return Evaluation(configs, texts, dense, **options).run()


def test_several_models_and_texts(plain, packed, texts, monkeypatch):
    """The numbers of each alone; one model in memory at a time, each text read once."""
    alive, loads, read = [], [], []
    load, tokens = evaluation.reader.load_checkpoint, evaluation.evaluation_tokens

    def loaded(*args):
        model = load(*args)
        loads.append(sum(each() is not None for each in alive))
        alive.append(weakref.ref(model.model))
        return model

    monkeypatch.setattr(evaluation.reader, "load_checkpoint", loaded)
    monkeypatch.setattr(
        evaluation, "evaluation_tokens", lambda *args: read.append(args[0]) or tokens(*args)
    )
    together = evaluate([*packed, plain], texts, plain)
    assert read == texts and loads == [0, 0, 0, 0]
    assert [each.made for each in together] == [True, True, False]
    for model, each in zip([*packed, plain], together, strict=True):
        assert [found.text for found in each.findings.texts] == texts
        for text, found in zip(texts, each.findings.texts, strict=True):
            (alone,) = evaluate([model], [text])
            (own,) = alone.findings.texts
            assert own.model_dump() == found.model_dump() | {"against": None}
            (dense,) = evaluate([plain], [text])
            full = dense.findings.texts[0]
            assert found.against.perplexity == full.perplexity
            assert found.against.ratio == pytest.approx(own.perplexity / full.perplexity)
            assert math.exp(sum(own.losses) / len(own.losses)) == pytest.approx(own.perplexity)
    four, three, itself = (each.findings.texts[0].against for each in together)
    assert 0 < four.divergence < three.divergence and itself.divergence == 0
    assert three.agreement < four.agreement < itself.agreement == 1


def test_a_dense_model_that_does_not_fit(plain, packed, texts, monkeypatch):
    """Streamed block by block it predicts the same; it writes nothing, and this is said."""
    (whole,) = evaluate([packed[1]], texts, plain)
    monkeypatch.setattr(evaluation, "free", lambda device: 10)
    said, steps = [], []
    (away,) = evaluate(
        [packed[1]], texts, plain, notice=said.append, progress=lambda *step: steps.append(step)
    )
    assert said == [f"{plain} does not fit into memory: it passes block by block"]
    assert any("blocks, for" in note and done == of == 3 for done, of, note in steps)
    for one, other in zip(whole.findings.texts, away.findings.texts, strict=True):
        assert one.perplexity == other.perplexity
        for name, value in one.against.model_dump(exclude={"dense"}).items():
            assert getattr(other.against, name) == pytest.approx(value, rel=1e-4)
    assert all(each.dense is not None for each in whole.findings.completions)
    assert all(each.dense is None for each in away.findings.completions)


def test_what_is_kept_beside_a_quantized_model(plain, out, texts):
    before = {path.name for path in out.iterdir()}
    (first,) = evaluate([out], texts[:1], plain)
    assert {path.name for path in out.iterdir()} - before == {FILE}
    kept = Findings.read(out / FILE)
    (text,), (told,) = first.findings.texts, kept.texts
    assert (told.text, told.against.dense) == ("one.txt", plain.name)  # names, no paths
    assert told.losses == text.losses and told.against.divergence == text.against.divergence
    assert kept.completions == first.findings.completions and kept.model == "out"
    # A later one adds to it, and what was compared stays where it is measured again.
    evaluate([out], texts[1:])
    evaluate([out], texts[:1])
    evaluate([out], texts[:1], seqlen=16)
    later = Findings.read(out / FILE)
    assert [(each.text, each.seqlen) for each in later.texts] == [
        ("one.txt", 64), ("two.txt", 64), ("one.txt", 16),
    ]  # fmt: skip
    assert later.texts[0] == kept.texts[0] and later.texts[0].against is not None
    assert later.texts[1].against is None
    assert later.completions == kept.completions and kept.completions[0].dense is not None
    # Neither beside a dense model, nor on the way to another format.
    assert not (plain / FILE).exists()
    assert FILE not in [path.name for path in Checkpoint.open(str(out)).companions()]
    told = describe(Checkpoint.open(str(out)))["evaluated"]
    assert told["texts"][0]["perplexity"] == kept.texts[0].perplexity
    assert "losses" not in told["texts"][0]


def test_where_nothing_is_kept(plain, packed, out, texts, tmp_path, monkeypatch):
    """The hub's cache is somebody else's; of a folder that takes nothing one line is said."""
    cached = tmp_path / "models--some--one" / "snapshots" / "abc"
    shutil.copytree(out, cached)
    evaluate([cached], texts[:1])
    assert not (cached / FILE).exists()

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    said = []
    monkeypatch.setattr(os, "replace", refused)
    before = sorted(out.iterdir())
    (found,) = evaluate([out], texts[:1], notice=said.append)
    assert found.findings.texts and sorted(out.iterdir()) == before
    assert said == [f"{FILE} is not kept, {out} cannot be written to: Permission denied"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 9}', "newer than this OPTQ"),
        ('{"optq": "1", "model": "m", "tasks": {"piqa": {"acc": NaN}}}', "is damaged"),
    ],
)
def test_damaged_findings_are_refused_before_any_work(out, texts, monkeypatch, content, expected):
    (out / FILE).write_text(content)
    monkeypatch.setattr(evaluation.reader, "load_checkpoint", None)
    with pytest.raises(ModelError, match=expected):
        evaluate([out], texts)
    with pytest.raises(ModelError, match=expected):
        describe(Checkpoint.open(str(out)))
    assert (out / FILE).read_text() == content


def test_a_model_that_is_named_twice(plain, packed, texts):
    for again in (plain, f"{plain}/", plain / ".." / plain.name):
        with pytest.raises(SettingError, match="is named twice"):
            evaluate([plain, packed[0], again], texts)


def test_a_text_that_is_shorter_than_a_window(packed, plain, tmp_path):
    (tmp_path / "short.txt").write_text("the end")
    for against in (None, plain):
        with pytest.raises(DataError, match="fewer than one sequence of 64"):
            evaluate([packed[0]], [str(tmp_path / "short.txt")], against)


def test_models_of_different_tokens(plain, packed, texts):
    with pytest.raises(ModelError, match="have different tokens") as refused:
        evaluate([packed[0]], texts, "demo")
    assert str(packed[0]) in refused.value.remedy


def test_a_token_that_one_model_lacks(plain, texts, tmp_path):
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(plain)
    small.resize_token_embeddings(40)
    small.save_pretrained(tmp_path / "small")
    zoo.tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(DataError, match="outside the model's vocabulary of 40"):
        evaluate([tmp_path / "small"], texts)


@pytest.mark.parametrize("whose", ["model", "dense model"])
def test_logits_that_are_not_finite(plain, texts, tmp_path, whose):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(plain, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][3] = math.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    models = (broken, plain) if whose == "model" else (plain, broken)
    with pytest.raises(NumericsError, match=f"the {whose}'s logits are not finite in window 0"):
        evaluate(models[:1], texts, models[1])


def test_scores_of_tasks_are_kept(out, monkeypatch):
    shots = object.__new__(ZeroShot)
    shots.limit = None
    monkeypatch.setattr(ZeroShot, "run", lambda *_: {"piqa": {"acc": 0.5, "word": None}})
    (found,) = evaluate([out], [], shots=shots)
    assert found.findings.tasks == {"piqa": {"acc": 0.5, "word": None}}
    assert not found.findings.completions
    shots.limit = 3  # of a few examples: no score of the task
    monkeypatch.setattr(ZeroShot, "run", lambda *_: {"piqa": {"acc": 1.0}})
    (found,) = evaluate([out], [], shots=shots)
    assert found.findings.tasks == {"piqa": {"acc": 1.0}}
    kept = Findings.read(out / FILE).tasks
    assert kept == {"piqa": {"acc": 0.5, "word": None}, "piqa, first 3": {"acc": 1.0}}


def test_what_a_text_gave_outlives_a_task_that_fails(out, texts, monkeypatch):
    def fails(*_):
        raise DataError("the data of piqa cannot be reached", "check the network")

    shots = object.__new__(ZeroShot)
    shots.limit = None
    monkeypatch.setattr(ZeroShot, "run", fails)
    with pytest.raises(DataError):
        evaluate([out], texts[:1], shots=shots)
    kept = Findings.read(out / FILE)
    assert [each.text for each in kept.texts] == ["one.txt"] and not kept.tasks


# What is said of it

AGAINST = Against(
    dense="llama", perplexity=10.0, divergence=0.0123, divergence_error=0.001,
    divergence_99_9=0.5, agreement=0.9, agreement_error=0.01, ratio=1.05, ratio_error=0.002,
)  # fmt: skip
FOUND = Findings(
    optq="1", model="out", tasks={"piqa": {"acc": 0.25, "norm": None}},
    texts=[OnText(text="demo", seqlen=64, tokens=630, perplexity=10.5, losses=[], against=AGAINST)],
    completions=[
        Completed(prompt="a", tokens=["b"] * 9, dense=["b"] * 9),
        Completed(prompt="c", tokens=["d"], dense=["e"], differs=0, fault="repeats itself"),
    ],
)  # fmt: skip


def test_the_table(capfd):
    evaluated.show([("out", FOUND)], "llama")
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert lines[1:3] == [
        "llama demo 10 of 64 10.0000",
        "out demo 10 of 64 10.5000 1.0500 ±0.0020 0.0123 ±0.0010 0.500 90.00%",
    ]
    assert "piqa acc 0.2500" in lines and "piqa norm -" in lines
    assert (
        "completions by out: 1 of 2 end in a loop or have invalid bytes; 1 of 2 are llama's"
        in lines
    )
    assert lines[-1] == "'cd': repeats itself"


def test_lines_of_findings():
    assert lines_of(FOUND.model_dump()) == {
        "perplexity on demo": "10.5000 in windows of 64 tokens, 1.0500 times that of llama:"
        " divergence 0.0123, agreement 90.00%",
        "piqa": "acc 0.2500, norm -",
    }


def test_what_was_compared_is_not_that_of_another_model():
    """Of another perplexity, such as after the folder's weights were replaced by hand."""
    other = FOUND.texts[0].model_copy(update={"perplexity": 12.0, "against": None})
    later = Findings(optq="1", model="out", texts=[other])
    merged = FOUND.with_later(later)
    assert merged.texts == [other] and merged.tasks == FOUND.tasks
    assert merged.completions == FOUND.completions
    assert json.loads(merged.text())["version"] == 1
    assert torch.tensor(merged.texts[0].perplexity) == 12
