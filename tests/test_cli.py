"""The command as a user runs it: what it prints where, and that its parts agree."""

import io
import json
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import zoo
from safetensors import safe_open

from optq import GPTQ, ModelConfig, Runner, cli, compare
from optq.formats.whole import Whole
from optq.record import TIMES
from optq.report import live

COMMAND = Path(sys.executable).with_name("optq")
BY_NAME = {row.name: row for row in zoo.ROWS}
TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40
QUANTIZE_KEYS = {
    "model", "out", "method", "wbits", "groupsize", "sym", "actorder", "percdamp",
    "bits_per_weight", "bytes", "seconds", "layers",
}  # fmt: skip
LAYER_KEYS = {"name", "rows", "cols", "error", "relative_error", "rtn_error", "damp", "seconds"}
# What is said of a block that is done where no terminal shows it.
BLOCK = re.compile(
    r"block (\d+) of (\d+): relative error [\d.e-]+%( \(rounding [\d.e-]+%\))?(, [a-z].*?)??"
    r", \d+ s(, about \d+ s left)?"
)
STAGES = {"total", "forward", "hessian", "factor", "solve", "write"}


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one JSON object on stdout, by the letter of the standard: no NaN, no Infinity."""

        def refuse(word):
            raise AssertionError(f"{word} is not JSON")

        assert len(self.out.splitlines()) == 1
        value = json.loads(self.out, parse_constant=refuse)
        assert isinstance(value, dict)
        return value


Command = Callable[..., Done]


@pytest.fixture
def optq(capfd, monkeypatch):
    """Run the command in this process: a process of its own spends seconds on imports."""
    on_term = signal.getsignal(signal.SIGTERM)

    def run(*words, err="") -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["optq", *map(str, words)])
        for handler in logging.getLogger("transformers").handlers:
            if type(handler) is logging.StreamHandler:
                monkeypatch.setattr(handler, "stream", sys.stderr)  # not an earlier test's
        with pytest.raises(SystemExit) as end:
            cli.main()
        done = Done(end.value.code, *capfd.readouterr())
        assert done.code == 0
        said = [line for line in done.err.splitlines() if not BLOCK.fullmatch(line)]
        if words[0] != "generate":  # which says there how fast it was
            assert said == err.splitlines()
        return done

    yield run
    signal.signal(signal.SIGTERM, on_term)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, called llama."""
    return zoo.save(BY_NAME["llama"], tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def words(folder, text, tmp_path):
    """`optq quantize` of the tiny model into tmp_path/out."""
    options = {"calib": text, "nsamples": 4, "seqlen": 32, "groupsize": 32, "device": "cpu"}
    return [
        "quantize", folder, tmp_path / "out",
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    ]  # fmt: skip


def contents(path):
    files = (file for file in sorted(Path(path).iterdir()) if file.name != TIMES)
    return {file.name: file.read_bytes() for file in files}


def test_quantize_json(optq, words, folder, tmp_path):
    done = optq(*words, "--json", "--sym", "--percdamp", "0.02").json
    assert done.keys() >= QUANTIZE_KEYS
    wanted = {
        "model": str(folder), "out": str(tmp_path / "out"), "method": "gptq", "wbits": 4,
        "groupsize": 32, "sym": True, "actorder": "group", "percdamp": 0.02,
    }  # fmt: skip
    assert {name: done[name] for name in wanted} == wanted
    assert done["seconds"].keys() >= STAGES
    assert all(value >= 0 for value in done["seconds"].values())
    assert len(done["layers"]) == 21
    for layer in done["layers"]:
        assert layer.keys() >= LAYER_KEYS
        assert 0 <= layer["error"] <= layer["rtn_error"] * (1 + 1e-6)
    weights = sum(layer["rows"] * layer["cols"] for layer in done["layers"])
    assert done["bits_per_weight"] == pytest.approx(8 * done["bytes"] / weights)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = [f"{layer['name']}.{s}" for layer in done["layers"] for s in
                 ("qweight", "qzeros", "scales", "g_idx")]  # fmt: skip
        assert done["bytes"] == sum(file.get_tensor(name).nbytes for name in names)


def test_quantize_for_a_person(optq, words, text, tmp_path):
    out = optq(*words).out
    for wanted in (
        f"{tmp_path / 'out'}  (gptq, 5.07 bits per weight)",
        "21 quantized, 70.1 kB",
        "0 linear layers left dense",
        "of round-to-nearest's",
        f"on {text}, 4 x 32 tokens, seed 0",
        f"optq inspect {tmp_path / 'out'}",
        *STAGES,
    ):
        assert wanted in " ".join(out.split()) or wanted in out
    assert "\x1b" not in out


@pytest.mark.parametrize("method", ["rtn", "gptq", "obq"])
@pytest.mark.parametrize(("wbits", "groupsize"), [(2, 32), (3, 64), (4, -1), (8, 32)])
def test_inspect_agrees_with_quantize(optq, words, tmp_path, method, wbits, groupsize):
    made = optq(
        *words, "--method", method, "--wbits", wbits, "--groupsize", groupsize, "--json"
    ).json
    seen = optq("inspect", tmp_path / "out", "--json").json
    assert (seen["bits"], seen["group_size"], seen["method"]) == (wbits, groupsize, method)
    assert seen["format"] == "gptq" and seen["architecture"] == "LlamaForCausalLM"
    assert seen["quantized_layers"] == len(made["layers"]) == 21
    assert seen["quantized_bytes"] == made["bytes"] < seen["bytes"]
    assert seen["bits_per_weight"] == pytest.approx(made["bits_per_weight"], abs=1e-3)
    without_times = [
        {name: value for name, value in layer.items() if "seconds" not in name}
        for layer in made["layers"]
    ]
    assert seen["layers"] == without_times
    assert seen["calibration"] == {
        "text": "text.txt",
        "samples": 4,
        "seqlen": 32,
        "seed": 0,
        "chat": False,
    }


OPTIONS = [
    (["--asym"], {"sym": False}, {"sym": False}),
    (["--plain", "--actorder"], {"actorder": True}, {"desc_act": True}),
    (["--plain", "--actorder", "--static-groups"], {"static_groups": True}, {"desc_act": False}),
    (["--plain"], {"mse": False, "polish": 0, "actorder": False}, {"desc_act": False}),
    (["--polish", "3"], {"polish": 3, "mse": True}, {"desc_act": False}),
    (["--no-actorder"], {"actorder": False, "mse": True}, {"desc_act": False}),
    (["--no-mse"], {"mse": False}, {}),
    (["--percdamp", "0.5"], {"percdamp": 0.5}, {}),
    (["--method", "rtn", "--mse"], {"mse": True}, {}),
    (["--method", "obq", "--mse", "--asym"], {"mse": True, "sym": False}, {"sym": False}),
]


@pytest.mark.parametrize(("flags", "quantizer", "config"), OPTIONS, ids=str)
def test_an_option_arrives(optq, words, tmp_path, flags, quantizer, config):
    optq(*words[:3], "--json", *words[3:])
    plain = (tmp_path / "out" / "model.safetensors").read_bytes()
    optq(*words, *flags, "--json", "--force")
    seen = optq("inspect", tmp_path / "out", "--json").json
    assert seen["quantizer"].items() >= quantizer.items()
    assert seen.items() >= config.items()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != plain


def test_a_group_size_that_fits(optq, words, folder, text, tmp_path):
    """Without --groupsize: 128 does not divide the 64 columns of most layers."""
    at = words.index("--groupsize")
    words = [*words[:at], *words[at + 2 :]]
    err = "optq: --groupsize 64: 128 does not fit every layer\n"
    assert optq(*words, "--json", err=err).json["groupsize"] == 64
    assert optq("inspect", tmp_path / "out", "--json").json["group_size"] == 64
    wide = optq(*words, "--skip", "q_proj|k_proj|v_proj|o_proj|up|gate", "--json", "--force").json
    assert wide["groupsize"] == 128  # as down_proj alone has it
    rows = [
        "compare", folder, "--methods", "rtn", "--wbits", "4", "--calib", text, "--text", text,
        "--nsamples", "4", "--seqlen", "32", "--results", tmp_path / "rows.jsonl", "--json",
    ]  # fmt: skip
    assert optq(*rows, err=err).json["rows"][1]["groupsize"] == 64


def test_a_comparison_of_some_layers(optq, folder, text, tmp_path):
    rows = [
        optq(
            "compare", folder, "--methods", "rtn", "--wbits", "4", "--groupsize", "32",
            "--calib", text, "--text", text, "--nsamples", "4", "--seqlen", "32",
            "--results", tmp_path / "rows.jsonl", "--json", *more,
        ).json["rows"][1]
        for more in ([], ["--skip", "mlp"])
    ]  # fmt: skip
    assert rows[1]["bytes"] < rows[0]["bytes"] and rows[1]["rise"] != rows[0]["rise"]


@pytest.mark.parametrize("wbits", [3, 8])
def test_the_command_and_a_program_write_the_same(optq, words, folder, text, tmp_path, wbits):
    """Error propagation is on in both: by default below 8 bits, and where it is asked for."""
    optq(*words, "--wbits", wbits)
    Runner(
        ModelConfig(str(folder), "cpu"), GPTQ(wbits, 32), qep=wbits < 8, calib=text, nsamples=4,
        seqlen=32, output=tmp_path / "other",
    ).run()  # fmt: skip
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_error_propagation(optq, words, tmp_path):
    optq(*words, "--wbits", "8", "--json")
    assert "qep" in (seen := optq("inspect", tmp_path / "out", "--json").json)
    assert seen["qep"] is None
    for flags, propagated in (
        (["--qep"], True),
        ([], True),  # where it is among the best known options
        (["--wbits", "3", "--no-qep"], False),
        (["--wbits", "3", "--plain"], False),
        (["--wbits", "3", "--method", "rtn"], False),
    ):
        optq(*words, *flags, "--json", "--force")
        seen = optq("inspect", tmp_path / "out", "--json").json
        assert (seen["qep"] == {"alpha": 0.5, "percdamp": 0.01, "exclude": None}) is propagated


def test_skipped_layers(optq, words, tmp_path):
    done = optq(*words, "--skip", "k_proj|down_proj", "--json").json
    assert len(done["layers"]) == 15
    assert not [layer for layer in done["layers"] if "k_proj" in layer["name"]]
    out = optq(*words, "--skip", "k_proj|down_proj", "--force").out
    assert "15 quantized" in out and "6 linear layers left dense" in out
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.0.self_attn.k_proj.weight" in file.keys()  # noqa: SIM118


def test_the_second_version_of_the_format(optq, words, tmp_path):
    optq(*words, "--asym", "--format", "gptq_v2", "--json")
    assert optq("inspect", tmp_path / "out", "--json").json["format"] == "gptq_v2"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"


def test_calibration_on_records(optq, words, folder, text, tmp_path):
    """The same text, as it is and cut into records at blank lines, gives the same tokens."""
    parts = [TEXT[:1000].strip(), TEXT[1000:].strip()]
    (tmp_path / "text.txt").write_text("\n\n".join(parts))
    records = "".join(json.dumps({"text": part}) + "\n" for part in parts)
    (tmp_path / "text.jsonl").write_text(records)
    for name in ("text.txt", "text.jsonl"):
        optq(*words, "--calib", tmp_path / name, "--json", "--force")
        seen = optq("inspect", tmp_path / "out", "--json").json
        assert seen["calibration"]["text"] == name
        (tmp_path / "out" / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    written = [
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("text.txt", "text.jsonl")
    ]
    assert written[0] == written[1]


def test_calibration_on_conversations(optq, words, tmp_path):
    source = zoo.save(BY_NAME["llama"], tmp_path / "chatty")
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    words = ["quantize", source, *words[2:], "--calib", tmp_path / "chat.jsonl", "--chat"]
    assert len(optq(*words, "--json").json["layers"]) == 21
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


def test_the_seed_decides_the_bytes(optq, words, tmp_path):
    made = []
    for seed in (3, 3, 4):
        optq(*words, "--seed", seed, "--force")
        made.append(contents(tmp_path / "out"))
    assert made[0] == made[1] != made[2]


def test_force_replaces_the_whole_folder(optq, words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "old").write_text("old")
    optq(*words, "--force")
    assert not (tmp_path / "out" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_interrupted_run(words, tmp_path, monkeypatch, capfd):
    """It says what it keeps; the same command goes on from that, another one must say --restart."""
    on_term, out, hidden = signal.getsignal(signal.SIGTERM), tmp_path / "out", ".out.partial"
    blocks = []  # that each run says are done

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["optq", *map(str, (*words, *more))])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capfd.readouterr().err.replace(f"{tmp_path}/", "").splitlines()
        blocks.append([line for line in said if BLOCK.fullmatch(line)])
        return end.value.code, [line for line in said if line not in blocks[-1]]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Whole, "appear", interrupted)
        code, said = run("--wbits", 4)
    kept = f"3 of 3 blocks are kept in {hidden}: the same command goes on from there,"
    assert code == 130 and not out.exists()
    assert said[:2] == [f"optq: {kept} --restart throws them away", "optq: interrupted"]
    code, said = run("--wbits", 3)
    assert code == 2 and said[0].startswith(f"optq: {hidden} holds finished blocks of another run")
    assert "wbits was 4 and is 3" in said[0] and "--restart" in said[1] and len(said) == 2
    code, said = run("--wbits", 4)
    assert code == 0 and said == [f"optq: going on after 3 of 3 blocks, which {hidden} holds"]
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(Whole, "appear", interrupted)
        run("--wbits", 4)
    code, said = run("--wbits", 3, "--restart")
    assert code == 0 and said == [f"optq: threw away what was in {hidden}"]
    assert [len(lines) for lines in blocks] == [2, 0, 0, 2, 3]
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(live.Live, "end", interrupted)  # when the second block has begun
        assert run("--wbits", 4)[0] == 130
    code, said = run("--wbits", 4)
    assert code == 0 and said == [f"optq: going on after 1 of 3 blocks, which {hidden} holds"]
    told = [BLOCK.fullmatch(line) for line in blocks[-1]]
    assert [(line[1], line[2], line[5] is None) for line in told] == [
        ("2", "3", False), ("3", "3", True),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    signal.signal(signal.SIGTERM, on_term)


def test_inspect_for_a_person(optq, words, folder, tmp_path):
    optq(*words)
    out = optq("inspect", tmp_path / "out").out
    for line in ("bits 4", "group size 32", "quantized layers 21", "bits per weight 5.069"):
        assert line in [" ".join(found.split()) for found in out.splitlines()]
    assert "2.mlp.down_proj" in out and "64 x 128" in out and "%" in out
    plain = optq("inspect", folder).out
    assert "not quantized" in plain and "LlamaForCausalLM" in plain
    assert optq("inspect", folder, "--json").json["layers"] == []


def test_eval_of_both_models(optq, words, folder, text, tmp_path):
    optq(*words, "--wbits", "8")
    measured = []
    for model in (folder, tmp_path / "out"):
        done = optq("eval", model, "--text", text, "--device", "cpu", "--json").json
        keys = {"model", "text", "seqlen", "tokens", "perplexity"}
        assert done.keys() == keys | ({"completions"} if model != folder else set())
        assert (done["model"], done["text"], done["seqlen"]) == (str(model), str(text), 64)
        assert done["tokens"] > 1000 and done["tokens"] % 63 == 0
        measured.append(done["perplexity"])
    assert measured[0] != measured[1] == pytest.approx(measured[0], rel=0.05)
    shorter = optq("eval", folder, "--text", text, "--seqlen", "16", "--json").json
    assert shorter["seqlen"] == 16 and shorter["tokens"] % 15 == 0
    person = optq("eval", folder, "--text", text).out
    assert person.splitlines()[1].split()[-4:] == ["43", "of", "64", f"{measured[0]:.4f}"]


def test_eval_of_several_models_against_a_dense_one(optq, words, folder, text, tmp_path):
    optq(*words, "--wbits", "3")
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text("the rest of it is as near as the other end. " * 40)
    both = ["--text", f"{text},{other}", "--device", "cpu"]
    done = optq("eval", out, folder, *both, "--against", folder, "--json").json
    assert done.keys() == {"models"} and len(done["models"]) == 2
    for model, each in zip((out, folder), done["models"], strict=True):
        assert each.keys() == {"model", "texts", "completions"} and each["model"] == str(model)
        assert [found["text"] for found in each["texts"]] == [str(text), str(other)]
    one = optq("eval", out, "--text", text, "--against", folder, "--json").json
    assert one.keys() == {
        "model", "text", "seqlen", "tokens", "perplexity", "against", "completions",
    }  # fmt: skip
    first = done["models"][0]["texts"][0]
    assert first == {key: one[key] for key in first}
    far = one["against"]
    assert far["dense"] == str(folder) and far["ratio"] * far["perplexity"] == pytest.approx(
        one["perplexity"]
    )
    assert 0 < far["divergence"] < far["divergence_99_9"] and 0 < far["agreement"] < 1
    kept = json.loads((out / "optq_eval.json").read_text())
    assert [each["text"] for each in kept["texts"]] == [text.name, other.name]
    assert not (folder / "optq_eval.json").exists()
    told = optq("eval", out, "--text", text, "--against", folder).out
    assert f"{far['agreement']:.2%}" in told and f"{far['divergence']:.4f} ±" in told
    assert f"perplexity on {text.name}" in optq("inspect", out).out
    (told, _) = optq("inspect", out, "--json").json["evaluated"]["texts"]
    assert told["against"] == far | {"dense": folder.name}
    optq("export", out, tmp_path / "v2", "--format", "gptq_v2")
    assert not (tmp_path / "v2" / "optq_eval.json").exists()


def test_eval_of_a_local_task(optq, words, tmp_path, monkeypatch, capfd):
    """Through lm-eval itself, from the command to the file beside the checkpoint."""
    pytest.importorskip("lm_eval.models.huggingface")
    import datasets
    from lm_eval import tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"q": f"{i} and {i} is", "gold": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "local.yaml").write_text(
        f"""task: optq_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{tmp_path / "rows.jsonl"}'}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["the", "of"]
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    own = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda: own(include_path=str(place), include_defaults=False)
    )
    optq(*words, "--wbits", "3")
    said = ["optq", "eval", tmp_path / "out", "--tasks", "optq_local", "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", [*map(str, said)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    done = Done(end.value.code, *capfd.readouterr()).json  # lm-eval has its own words on stderr
    assert done["tasks"].keys() == {"optq_local"} and 0 <= done["tasks"]["optq_local"]["acc"] <= 1
    assert json.loads((tmp_path / "out" / "optq_eval.json").read_text())["tasks"] == done["tasks"]


@pytest.fixture
def harness(monkeypatch):
    """As much of lm-eval as is called; tests/evaluate/test_tasks.py has the whole of it."""
    asked = []

    class TaskManager:
        def match_tasks(self, names):
            return [name for name in names if name in ("piqa", "lambada")]

    class HFLM:
        def __init__(self, pretrained, tokenizer):
            assert type(pretrained).__name__ == "LlamaForCausalLM" and tokenizer is not None

    def simple_evaluate(model, **options):
        assert isinstance(model, HFLM) and isinstance(options["task_manager"], TaskManager)
        asked.append((options["tasks"], options["limit"]))
        scores = {
            "piqa": {"alias": "piqa", "acc,none": 0.25, "acc_stderr,none": 0.1},
            "lambada": {"acc,none": 1.0, "perplexity,none": float("inf")},
        }
        return {"results": {name: scores[name] for name in options["tasks"]}}

    for name, part in (
        ("lm_eval", {"simple_evaluate": simple_evaluate}),
        ("lm_eval.tasks", {"TaskManager": TaskManager}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": HFLM}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**part))
    return asked


def test_eval_of_tasks(optq, harness, folder, text):
    words = ["eval", folder, "--device", "cpu", "--tasks", "piqa, lambada"]
    scores = {"piqa": {"acc": 0.25}, "lambada": {"acc": 1.0, "perplexity": None}}
    alone = optq(*words, "--limit", "5", "--json").json
    assert alone == {"model": str(folder), "tasks": scores}
    both = optq(*words, "--text", text, "--json").json
    assert both["tasks"] == scores and both["perplexity"] > 1 and both["seqlen"] == 64
    assert harness == [(["piqa", "lambada"], 5), (["piqa", "lambada"], None)]
    lines = [line.split() for line in optq(*words).out.splitlines()]
    assert lines == [
        ["task", "metric", "score"],
        ["piqa", "acc", "0.2500"], ["lambada", "acc", "1.0000"], ["lambada", "perplexity", "-"],
        ["next:", "optq", "quantize", str(folder), "OUT"],
    ]  # fmt: skip


@pytest.fixture(params=["ascii", "cp1252"])
def narrow(request, monkeypatch):
    """Run the command into a pipe that does not take every character."""

    def run(*words) -> str:
        pipe = io.TextIOWrapper(io.BytesIO(), encoding=request.param)
        monkeypatch.setattr(sys, "argv", ["optq", *map(str, words)])
        with monkeypatch.context() as changed, pytest.raises(SystemExit) as end:
            changed.setattr(sys, "stdout", pipe)
            cli.main()
        pipe.flush()
        assert end.value.code == 0
        return pipe.buffer.getvalue().decode(request.param)

    on_term = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, on_term)


def test_a_pipe_that_takes_few_characters(narrow, words, folder, text, tmp_path):
    """Bars of number signs, boxes of dashes, and what has no place is written as its number."""
    out = tmp_path / "\u2192"
    told = narrow(*words[:2], out, *words[3:])
    assert re.search(r"\nforward +[\d.]+ +#*", told) and "\\u2192" in told
    inspected = [line.rstrip() for line in narrow("inspect", out).splitlines()]
    bars = [line.rpartition("%")[2].strip() for line in inspected if "down_proj" in line]
    assert len(bars) == 3 and all(set(bar) == {"#"} for bar in bars)
    every = [line.rpartition("%")[2].strip() for line in inspected if "proj" in line]
    assert max(map(len, every)) == 20
    rows = [
        "compare", folder, "--methods", "rtn,plain", "--wbits", "3", "--groupsize", "32",
        "--calib", text, "--text", text, "--nsamples", "4", "--seqlen", "32",
        "--results", tmp_path / "rows.jsonl",
    ]  # fmt: skip
    assert "#" * 30 in narrow(*rows)
    few = ["--max-new-tokens", "2"]
    assert "\\u2192" in narrow("generate", out, "the \u2192", *few, "--compare", folder)
    assert narrow("generate", out, "the", *few).endswith("\n")


def test_a_model_that_writes_what_the_pipe_does_not_take(narrow, monkeypatch):
    from optq.evaluate import generate

    class Completion:
        speed = generate.Speed(prompt=1, new=2, first=0.5, rate=20.0)

        def __init__(self, *_): ...

        def run(self, show):
            show("\u2192 \U0001f600")

    monkeypatch.setattr(generate, "Completion", Completion)
    monkeypatch.setattr(ModelConfig, "load", lambda self: (None, None))
    assert narrow("generate", "any", "the") == "\\u2192 \\U0001f600\n"


def test_generate(optq, words, folder, tmp_path):
    optq(*words)
    for model in (folder, tmp_path / "out"):
        written = [
            optq("generate", model, "the rest", "--max-new-tokens", "12").out for _ in range(2)
        ]
        assert written[0] == written[1]
        assert written[0].endswith("\n") and len(written[0]) > 4
        shorter = optq("generate", model, "the rest", "--max-new-tokens", "4")
        assert written[0].startswith(shorter.out.rstrip("\n"))
        said = re.fullmatch(
            r"optq: (\d+) tokens read in [\d.]+ s, then ([\d.]+) tokens/s\n", shorter.err
        )
        assert int(said[1]) > 1 and float(said[2]) > 0


def test_generate_is_greedy_whatever_the_model_prefers(optq, folder, tmp_path):
    """Penalties, beams and samples of its generation config are not the likeliest token."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    written = optq("generate", model, "the rest", "--max-new-tokens", "12").out
    config = {"num_beams": 4, "do_sample": True, "repetition_penalty": 3.0}
    (model / "generation_config.json").write_text(json.dumps(config))
    assert optq("generate", model, "the rest", "--max-new-tokens", "12").out == written


@pytest.mark.parametrize("end", ["interrupt", "closed pipe"])
def test_generate_ends_at_once(folder, end):
    """Without a traceback, and without an abort, which is how a thread inside torch would end."""
    words = [COMMAND, "generate", folder, "the", "--max-new-tokens", "60"]
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(1)
    if end == "interrupt":
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130), err
        if process.returncode == 0:  # it was done already, and Python on its way out
            err = b""
    else:
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) in (0, 1)
    assert b"Traceback" not in err and b"terminate" not in err


def test_generate_side_by_side(optq, words, folder, tmp_path):
    optq(*words)
    alone = [
        optq("generate", model, "the rest", "--max-new-tokens", "6").out.strip()
        for model in (tmp_path / "out", folder)
    ]
    both = optq(
        "generate", tmp_path / "out", "the rest", "--max-new-tokens", "6", "--compare", folder
    )
    assert both.err == "" and both.out.count("tokens/s") == 2
    row = next(line for line in both.out.splitlines() if "the rest" in line)
    assert all(text.splitlines()[0].strip() in row for text in alone)


def test_bench(optq, words, tmp_path, monkeypatch):
    from optq.evaluate import speed

    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.setattr(speed, "BUFFER", 2**20)
    optq(*words)
    report = optq("bench", tmp_path / "out", "--device", "cpu", "--json").json
    assert report["packed"]["bytes"] < 0.5 * report["dense"]["bytes"]  # float32, groups of 32
    assert all(
        report[kind][key] > 0 for kind in ("packed", "dense") for key in ("prefill", "decode")
    )
    assert sum(shape["layers"] for shape in report["shapes"]) == 21
    assert {shape["kernel"] for shape in report["shapes"]} == {"cpu_int4"}
    assert all(shape["microseconds"] > 0 and shape["bandwidth"] > 0 for shape in report["shapes"])
    person = optq("bench", tmp_path / "out", "--device", "cpu").out
    assert "decode, tokens/s" in person and "memory bandwidth" in person


def test_compare(optq, folder, text, tmp_path):
    words = [
        "compare",
        folder,
        "--calib",
        text,
        "--text",
        text,
        "--nsamples",
        "4",
        "--seqlen",
        "32",
    ]
    words += [
        "--methods",
        "rtn,plain,gptq",
        "--wbits",
        "3, 2",
        "--groupsize",
        "32",
        "--device",
        "cpu",
    ]
    words += ["--results", tmp_path / "rows.jsonl", "--chart", tmp_path / "chart.svg"]
    rows = optq(*words, "--json").json["rows"]
    assert [(row["method"], row["wbits"]) for row in rows] == [
        ("none", 32), *((method, wbits) for wbits in (3, 2) for method in ("rtn", "plain", "gptq")),
    ]  # fmt: skip
    assert (tmp_path / "chart.svg").read_text().count("<rect") == 7
    person = optq(*words).out  # from the rows that are there
    assert "round to nearest" in person and f"{rows[3]['perplexity']:.2f}" in person


def test_export(optq, words, tmp_path):
    optq(*words)
    out, there, back = (tmp_path / name for name in ("out", "there", "back"))
    told = optq("export", out, there, "--format", "compressed-tensors").out
    assert "compressed-tensors" in told and "21" in told
    optq("export", there, back, "--format", "gptq")
    assert optq("inspect", there, "--json").json["format"] == "compressed-tensors"
    assert contents(back)["model.safetensors"] == contents(out)["model.safetensors"]
    assert contents(back)["optq.json"] == contents(out)["optq.json"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_stops_where_the_positions_end(optq, tmp_path, name):
    """64 positions; a model that has learned them cannot go on, and a user cannot know."""
    source = zoo.save(BY_NAME[name], tmp_path / name)
    assert optq("generate", source, "the rest", "--max-new-tokens", "100").out.endswith("\n")


def test_generate_prints_pieces_as_they_come(folder, monkeypatch):
    from optq.evaluate import generate

    speed = generate.Speed(prompt=1, new=2, first=0.5, rate=20.0)

    class Completion:
        def __init__(self, *_):
            self.speed = speed

        def run(self, show):
            return "".join(show(piece) or piece for piece in ("one", "two"))

    monkeypatch.setattr(generate, "Completion", Completion)
    printed = []
    monkeypatch.setattr("builtins.print", lambda *args, **more: printed.append((args, more)))
    cli.use.generate(str(folder), "the", device="cpu")
    assert printed == [
        (("one",), {"end": "", "flush": True}), (("two",), {"end": "", "flush": True}), ((), {}),
        (("optq: 1 tokens read in 0.50 s, then 20.0 tokens/s",), {"file": sys.stderr}),
    ]  # fmt: skip


@pytest.fixture
def small_demo(monkeypatch):
    """The bundled model with fewer samples and windows, for speed."""
    everything = compare.evaluation_tokens
    monkeypatch.setattr(compare, "DEMO_SAMPLES", 16)
    monkeypatch.setattr(compare, "evaluation_tokens", lambda *args: everything(*args)[:8])


def test_the_demo(optq, small_demo, monkeypatch):
    done = optq("demo", "--json", "--device", "cpu").json
    assert done.keys() == {"model", "rows"} and done["model"] == "demo"
    rows = done["rows"]
    assert [(row["method"], row["wbits"]) for row in rows] == [
        ("none", 16), ("rtn", 4), ("gptq", 4), ("rtn", 3), ("gptq", 3), ("rtn", 2), ("gptq", 2),
    ]  # fmt: skip
    keys = {field.name for field in fields(compare.Row)}
    assert all(row.keys() == keys for row in rows)
    assert rows[0]["bits_per_weight"] == 16 and rows[0]["groupsize"] == -1
    for row in rows[1:]:
        assert row["groupsize"] == 128
        assert row["wbits"] < row["bits_per_weight"] < row["wbits"] + 0.3
        assert row["bytes"] * 16 == pytest.approx(rows[0]["bytes"] * row["bits_per_weight"])
    assert all(row["rise"] == row["perplexity"] - rows[0]["perplexity"] for row in rows)
    rise = {(row["method"], row["wbits"]): row["rise"] for row in rows[1:]}
    for wbits in (4, 3):
        assert 0 < rise["gptq", wbits] <= 0.5 * rise["rtn", wbits]
    assert rise["gptq", 2] < rise["rtn", 2]

    rows = [compare.Row(**row) for row in rows]
    monkeypatch.setattr(compare, "demo_rows", lambda device, progress, *_: rows)
    table = optq("demo").out
    assert table.count("GPTQ") == table.count("round to nearest") == 3
    assert "full precision" in table and f"{rows[0].perplexity:.2f}" in table
    assert f"+{rise['gptq', 3]:.2f}" in table and "\x1b" not in table


def test_eval_and_the_demo_read_equally_far():
    """Else `optq eval demo` and the first row of `optq demo` contradict each other."""
    from optq.demo import MODEL

    config = json.loads((Path(MODEL) / "config.json").read_text())
    assert min(2048, config["max_position_embeddings"]) == compare.DEMO_SEQLEN


def test_streams_of_a_real_process(words):
    """The result on stdout, progress on the terminal behind stderr, and an end of the line."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, *map(str, words), "--nsamples", "64", "--json"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    out = process.stdout.read()
    assert process.wait() == 0
    assert Done(0, out, "").json["layers"]
    assert b"quantizing" in seen and b"layers" not in seen.replace(b"model.layers", b"")
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l")  # the cursor is back
    assert seen.endswith((b"\x1b[2K", b"\r"))  # and the bar is gone


def test_a_real_process_says_a_line_for_each_block(words, folder, tmp_path):
    command = [COMMAND, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [BLOCK.fullmatch(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0 and [line.group(1, 2) for line in lines] == [
        ("1", "3"), ("2", "3"), ("3", "3"),
    ]  # fmt: skip
    assert [line[5] is None for line in lines] == [False, False, True]  # time left
    assert all(line[3] and line[4] is None for line in lines)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "optq",
            "generate",
            tmp_path / "out",
            "the",
            "--max-new-tokens",
            "8",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("\n")
    assert re.fullmatch(r"optq: .* tokens/s\n", done.stderr)


@pytest.mark.parametrize("width", [80, 120])
def test_the_last_line_says_what_to_do_next(
    optq, words, folder, text, tmp_path, small_demo, monkeypatch, width
):
    """Of every command that ends in a table, on a terminal and elsewhere; not with --json."""
    from rich.console import Console

    from optq.evaluate import speed
    from optq.report import steps, tables

    terminal = Console(force_terminal=True, width=width, highlight=False, markup=False, emoji=False)
    for console in (tables, steps) if width == 80 else ():
        monkeypatch.setattr(console, "stdout", terminal)
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.setattr(speed, "BUFFER", 2**20)
    row = compare.Row("none", 16, -1, 16.0, 100, 2.0)
    rows = [row, compare.Row("gptq", 4, 128, 4.2, 100, 2.5, 0.5, 1.0)]
    monkeypatch.setattr(compare, "demo_rows", lambda device, progress, *_: rows)
    out, v2, gguf = tmp_path / "out", tmp_path / "v2", tmp_path / "out of it.gguf"
    monkeypatch.setattr("optq.formats.gguf.export_gguf", lambda *_: FILE)
    compared = ["compare", folder, "--calib", text, "--text", text, "--nsamples", 4, "--seqlen", 32]
    compared += ["--groupsize", 32, "--wbits", "3,2", "--methods", "rtn,plain"]
    compared += ["--results", tmp_path / "rows.jsonl", "--device", "cpu"]
    settings = f"--groupsize 32 --calib {text} --nsamples 4 --seqlen 32"
    optq(*compared)
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    won = min(kept, key=lambda row: row["perplexity"])  # of a random model it may be any
    best = f"{'--plain' if won['method'] == 'plain' else '--method rtn'} --wbits {won['wbits']}"
    for run, wanted in (
        ([*words, "--dry-run"], "the same command without --dry-run"),
        (
            words,
            f"optq eval {out} --against {folder}, or optq inspect {out},"
            f" or optq generate {out} PROMPT",
        ),
        (["inspect", out], f"optq eval {out}"),
        (["inspect", folder], f"optq quantize {folder} OUT"),
        (["eval", out, folder, "--text", text], f"optq report {out}"),
        (["inspect", out], f"optq report {out}"),
        (
            ["eval", out, "--text", text, "--against", folder],
            f"optq report {out} --against {folder}",
        ),
        (["eval", folder, "--text", text], f"optq quantize {folder} OUT"),
        (["bench", out, "--device", "cpu"], f"optq generate {out} PROMPT"),
        (
            ["export", out, v2, "--format", "gptq_v2"],
            f"optq inspect {v2}",
        ),
        (["export", out, gguf, "--format", "gguf"], f"llama-cli -m '{gguf}'"),
        (compared, f"optq quantize {folder} OUT {best} {settings}"),
        (["demo"], "optq quantize MODEL OUT, of a folder or a hub id in the place of MODEL"),
    ):
        said = optq(*run).out.replace("\x1b[1m", "").replace("\x1b[0m", "")
        assert said.splitlines()[-1] == f"next: {wanted}"
        assert width == 80 or all(line == line.rstrip() for line in said.splitlines())
        if run[0] not in ("export", "quantize"):
            assert "next:" not in optq(*run, "--json").out


FILE = {"file": "out.gguf", "bytes": 6e6, "tensors": {"Q4_0": 28, "F32": 9}, "minimum_moved": 0.0}


def test_experts_have_a_line_a_projection_and_those_short_of_tokens_one(capfd):
    from optq.report import said, tables

    def record(name, error, tokens, borrowed):
        facts = {"rows": 8, "cols": 8, "error": error, "relative_error": error, "rtn_error": 1.0}
        return {"name": name, "tokens": tokens, "borrowed": borrowed, **facts}

    attention = [record(f"model.layers.{i}.fc1", 0.5, 99, 0) for i in range(2)]
    few = [
        record(f"model.layers.{i}.mlp.experts.{e}.{part}", (e + 1) / 10, e, e % 3)
        for i in range(2)
        for e in range(4)
        for part in ("up_proj", "down_proj")
    ]
    assert said.short_of_tokens(attention) == {}
    line = "2 of 8 saw no token, 4 borrowed some of their block's"
    assert said.short_of_tokens(attention + few) == {"experts": line}
    tables.layers(attention + few)
    rows = capfd.readouterr().out.splitlines()[1:]
    assert len(rows) == 2 + 4
    assert "1.mlp.experts.*.down_proj, worst of 4" in rows[-1] and "40.00%" in rows[-1]
