"""End-to-end tuning of the scales: what it changes, what it keeps, and a run that is cut off."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import decoder
import numpy as np
import pytest
import torch
import zoo
import zoo_configs as configs
from test_resume import Cut, contents, only

import optq.tune
from optq import GPTQ, ModelConfig, Runner
from optq.distill import Distill
from optq.errors import DataError, OutputError, SettingError
from optq.formats import writer
from optq.formats.whole import Whole
from optq.model.flow import Flow
from optq.model.student import Student
from optq.record import RunRecord
from optq.tune import Tune
from optq.tuning import Tuning

ROWS = {row.name: row for row in zoo.ROWS}
# What is held back is what the steps see: it improves for sure, on a model that learned nothing.
SAME = zoo.token_ids(1, 24).repeat(4, 1)
FEW = Distill(steps=6, every=2)
TWO_BITS = GPTQ.plain(2, 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama of three blocks, in bfloat16. To be read only."""
    return zoo.save(ROWS["llama_bfloat16"], tmp_path_factory.mktemp("distill") / "llama")


@pytest.fixture
def run(source, tmp_path):
    def made(distill=FEW, folder=source, at="out", **options):
        options = {"calib": SAME, "output": at and tmp_path / at} | options
        options = {"tune": distill and Tune(None, distill)} | options
        return Runner(ModelConfig(str(folder), "cpu"), TWO_BITS, **options).run()

    return made


def test_the_divergence_of_the_bundled_model_falls():
    told = []
    result = Runner(
        ModelConfig("demo", "cpu"),
        GPTQ.plain(2, 128),
        nsamples=24,
        seqlen=64,
        tune=Tune(None, Distill(steps=8, batch=4, every=4)),
        tuning=lambda *what: told.append(what),
    ).run()
    found = result.record.distilled
    assert found.kept and found.steps == 8 and found.held_back == 3 and not found.note
    assert found.after < 0.97 * found.before
    assert [what[:2] for what in told] == [(0, 8), (4, 8), (8, 8)]
    assert found.before == told[0][2] and found.after == min(what[2] for what in told)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_only_scales_change(run, tmp_path, form):
    run(format=form)
    run(None, at="before", format=form)
    layers = {at: dict(solved(tmp_path / at)) for at in ("out", "before")}
    assert layers["out"].keys() == layers["before"].keys()
    moved = 0
    for name, new in layers["out"].items():
        old = layers["before"][name]
        assert torch.equal(new.codes, old.codes) and torch.equal(new.zeros, old.zeros)
        assert torch.equal(new.g_idx, old.g_idx)
        ratio = new.scales / old.scales
        assert ratio.min() > 0.8 and ratio.max() < 1.25
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(new.scales.to(dtype).float(), new.scales)
        moved += int((ratio != 1).sum())
    assert moved > 100
    old, new = (RunRecord.read(tmp_path / at / "optq.json") for at in ("before", "out"))
    assert old.distilled is None and new.distilled.kept
    assert new.model_copy(update={"distilled": None, "tune": None}) == old


def solved(folder):
    from optq.formats import reader
    from optq.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(str(folder))
    return ((n, reader.read_layer(checkpoint, n)) for n in reader.quantized_layers(checkpoint))


@pytest.mark.parametrize("name", ["llama_bfloat16", "qwen3_moe", "gpt2", "llama4"])
def test_what_is_written_is_what_was_measured(run, tmp_path, name):
    """The file, the model of a run without one, and what that saves; of a file and in memory."""
    row = ROWS.get(name) or zoo.Row(name, getattr(configs, name), "", ())
    folder = tmp_path / "model"
    row.build().save_pretrained(folder)
    written, kept = run(folder=folder), run(folder=folder, at=None)
    assert written.record.distilled == kept.record.distilled
    assert kept.record.distilled.kept
    kept.save(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "out")
    weights = dict(kept.model.state_dict())
    if name != "llama_bfloat16":
        return
    for layer, expected in decoder.decode(tmp_path / "out").items():
        found = weights[f"{layer}.weight"]
        assert np.array_equal(torch.from_numpy(expected).to(found.dtype).double(), found.double())
    with torch.no_grad():
        full = row.build()(SAME).logits.float().log_softmax(-1)
        own = kept.model(SAME).logits.float().log_softmax(-1)
    expected = (full.exp() * (full - own)).sum(-1).mean().item()
    assert kept.record.distilled.after == pytest.approx(expected, rel=1e-2)


def test_the_same_seed_gives_the_same_bytes(run, tmp_path):
    run()
    run(at="again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_scales_stay_where_nothing_is_gained(run, tmp_path):
    """On samples that no step sees; here of a model that has learned nothing."""
    calib = zoo.token_ids(8, 24)
    result = run(Distill(steps=9, lr=0.5, every=1, patience=2), calib=calib)
    run(None, at="before", calib=calib)
    found = result.record.distilled
    assert not found.kept and found.after == found.before and found.steps == 2
    assert found.note == "nothing was gained after step 0"
    weights = [(tmp_path / at / "model.safetensors").read_bytes() for at in ("out", "before")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("step", [1, 4])
def test_a_divergence_that_is_not_finite(run, monkeypatch, step):
    """Ends it; the best scales before stay, and the record says so."""
    learned, own = 0, Student.divergence

    def broken(student, tokens, wanted, learn=False):
        nonlocal learned
        learned += learn
        return float("nan") if learn and learned == step else own(student, tokens, wanted, learn)

    expected = run(at=None).record.distilled
    monkeypatch.setattr(Student, "divergence", broken)
    result = run(at=None)
    found = result.record.distilled
    assert found.steps == step - 1 and f"step {step}" in found.note
    assert found.kept is (step > 1) and (found.after < found.before) is found.kept
    assert found.before == expected.before
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert json.loads(result.record.text())["distilled"]["note"] == found.note


# What is refused


def test_too_little_text_to_hold_any_back(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Flow, "run", lambda _: pytest.fail("it works"))
    for calib in (SAME[:1], None):
        with pytest.raises(DataError, match=r"only one\nchoose --nsamples 2 or more"):
            run(calib=calib, nsamples=1, seqlen=24)
    assert not (tmp_path / "out").exists()


def test_several_processes(run, monkeypatch):
    monkeypatch.setattr(optq.tune, "launched", lambda: True)
    with pytest.raises(SettingError, match=r"one process\n.*without torchrun"):
        run()


# A run that is cut off


def test_cut_off_while_it_tunes(run, tmp_path, monkeypatch):
    """It goes on from the blocks, and tunes from the first step."""
    run(at="alone")

    def cut(step, steps, divergence):
        if step == 4:
            raise Cut

    with pytest.raises(Cut):
        run(tuning=cut)
    monkeypatch.setattr(Flow, "run", lambda _: pytest.fail("a block is done again"))
    said = []
    run(notice=said.append)
    assert len(said) == 1 and "going on after 3 of 3 blocks" in said[0]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_cut_off_after_blocks_that_were_tuned_too(source, tmp_path, monkeypatch):
    def run(at, **options):
        config, tune = ModelConfig(str(source), "cpu"), Tune(Tuning(steps=8), FEW)
        options |= {"calib": SAME, "output": tmp_path / at, "tune": tune}
        return Runner(config, TWO_BITS, **options).run().record

    def cut(*_):
        raise Cut

    alone = run("alone")
    assert alone.distilled.kept and len(alone.tuned) == 3
    with pytest.raises(Cut):
        run("out", tuning=cut)
    monkeypatch.setattr(Flow, "run", lambda _: pytest.fail("a block is done again"))
    assert run("out").text() == alone.text()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("shards", [False, True])
def test_killed_while_the_tuned_scales_are_written(run, tmp_path, monkeypatch, shards):
    """Never tuned twice, and no scale from before among them."""
    (tmp_path / "place").mkdir()
    if shards:
        monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    run(at="alone")
    alone, out = contents(tmp_path / "alone"), tmp_path / "place" / "out"
    assert ("model.safetensors" in alone) is not shards
    rename, finished, moment = Path.rename, 0, 0
    left: list[int] = []  # renames until it dies, once all steps are done

    def dying(path, place):
        if left:
            left[0] -= 1
            if left[0] == 0:
                raise Cut
        return rename(path, place)

    while True:
        moment += 1
        left.clear()

        def tuning(step, steps, divergence, moment=moment):
            if step == steps:
                left.append(moment)

        with monkeypatch.context() as patch:
            patch.setattr(Whole, "_clear", lambda _: None)  # nobody tidies up after a kill
            patch.setattr(Path, "rename", dying)
            with suppress(Cut):
                run(at=out, tuning=tuning)
        if left[0] > 0:
            break
        left.clear()
        if not (out.exists() and [*out.iterdir()]):
            finished += 1
            run(at=out)
        else:
            with pytest.raises(OutputError, match="exists"):
                run(at=out)
        assert contents(out) == alone and only(out), moment
        shutil.rmtree(out)
    assert finished > (5 if shards else 2)


def test_other_settings_go_on_from_the_blocks(run, tmp_path, monkeypatch):
    """Which are the same, whatever becomes of the scales."""
    run(Distill(steps=5), at="alone")

    def cut(*_):
        raise Cut

    with pytest.raises(Cut):
        run(tuning=cut)
    monkeypatch.setattr(Flow, "run", lambda _: pytest.fail("a block is done again"))
    run(Distill(steps=5))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_other_settings_of_blocks_do_not_go_on(run):
    def cut(*_):
        raise Cut

    with pytest.raises(Cut):
        run(tuning=cut)
    with pytest.raises(OutputError, match="tune was off and is on"):
        run(tune=Tune())
