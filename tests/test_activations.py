"""Methods that quantize activations, end to end: the command, resuming, planted outliers."""

import hashlib
import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import zoo

from optq import GPTQ, ModelConfig, Runner, SmoothQuant, cli, compare, load
from optq.core.tokens import rounded
from optq.data.evaluation import evaluation_tokens
from optq.errors import SettingError
from optq.evaluate.divergence import divergence
from optq.evaluate.llm_int8 import LLMInt8
from optq.model.blocks import find_blocks
from optq.model.predictions import predictions
from optq.record import TIMES, RunRecord
from optq.report import compared

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import outliers

ROWS = {row.name: row for row in zoo.ROWS}
CALIB = zoo.token_ids(4, 24)
TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return zoo.save(ROWS["llama"], tmp_path_factory.mktemp("activations") / "llama")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def optq(capfd, monkeypatch):
    """Run the command in this process: its exit status, stdout and stderr."""
    on_term = signal.getsignal(signal.SIGTERM)

    def run(*words):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["optq", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, on_term)


def contents(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).iterdir()
        if path.name != TIMES
    }


def test_the_command(source, text, tmp_path, optq):
    out, short = tmp_path / "out", ("--calib", text, "--nsamples", 4, "--seqlen", 32)
    code, told, err = optq(
        "quantize", source, out, "--method", "smoothquant", "--wbits", 8, "--abits", 8, *short
    )
    assert code == 0
    assert "compressed-tensors, 8." in told and "smoothed" in told and "of 12 inputs" in told
    assert "not smoothed: o_proj, down_proj (no norm makes its input)" in err
    record = RunRecord.read(out / "optq.json")
    assert record.method == "smoothquant" and record.quantizer["abits"] == 8
    sites = {site.site: site.smoothing for site in record.sites}
    for name, made in sites.items():
        if name.endswith(("o_proj", "down_proj")):
            assert made.unsmoothed and made.error is None
        else:
            assert made.unsmoothed is None and 0 < made.error <= made.plain_error
    code, told, _ = optq("inspect", out, "--json")
    what = json.loads(told)
    assert (what["format"], what["bits"], what["activation_bits"]) == ("int-quantized", 8, 8)
    code, told, _ = optq("eval", out, "--against", source, "--text", text, "--seqlen", 32, "--json")
    assert code == 0 and json.loads(told)["perplexity"] > 1
    assert optq("generate", out, "the", "--max-new-tokens", 3)[0] == 0

    code, told, _ = optq(
        "quantize", source, tmp_path / "plain", "--method", "rtn", "--abits", 8, "--json", *short
    )
    told = json.loads(told)
    assert (told["wbits"], told["abits"], told["alpha"], told["rounding"]) == (8, 8, "off", "rtn")
    assert (told["groupsize"], told["sym"], told["qep"]) == (-1, True, False)
    record = RunRecord.read(tmp_path / "plain" / "optq.json")
    assert all(site.smoothing is None for site in record.sites)
    plan = optq("quantize", source, tmp_path / "no", "--abits", 8, "--dry-run", "--json", *short)
    planned = json.loads(plan[1])
    assert planned["packed_bytes"] == told["bytes"] and planned["format"] == "compressed-tensors"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--method", "obq", "--abits", "8"), "the method obq has no --abits"),
        (("--abits", "4"), "abits is 4, and weights and activations are multiplied in 8 bits"),
        (("--abits", "8", "--wbits", "4"), "wbits is 4, and weights and activations"),
        (("--abits", "8", "--groupsize", "32"), "a run with --abits has no --groupsize"),
        (("--abits", "8", "--asym"), "a run with --abits has no --no-sym"),
        (("--abits", "8", "--plain"), "a run with --abits has no --plain"),
        (("--abits", "8", "--fast"), "a run with --abits has no --fast"),
        (("--abits", "8", "--polish", "1"), "a run with --abits has no --polish"),
        (("--abits", "8", "--alpha", "0.5"), "gptq has no --alpha"),
        (("--alpha", "0.5"), "gptq has no --alpha"),
        (("--method", "smoothquant", "--alpha", "much"), "--alpha much is no number"),
        (("--method", "smoothquant", "--alpha", "2"), "alpha is 2.0"),
        (("--abits", "8", "--format", "gptq"), "gptq says nothing of activations"),
        (("--abits", "8", "--qep"), "--qep is for weights alone"),
        (("--abits", "8", "--tune", "blocks"), "--tune is for weights alone"),
        (("--abits", "8", "--head", "8"), "--head is for weights alone"),
        (("--abits", "8", "--bits-per-weight", "5"), "a run with --abits has no --bits-per-weight"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(source, text, tmp_path, optq, words, cause):
    short = ("--calib", text, "--nsamples", 2, "--seqlen", 32)
    code, out, err = optq("quantize", source, tmp_path / "out", *words, *short)
    assert code == 2 and not out
    lines = [line for line in err.splitlines() if line.strip()]
    assert cause in lines[-2] and len(lines) == 2, err
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".out*")]


def test_experts_are_refused(tmp_path):
    import zoo_configs

    source = zoo.save(zoo.Row("moe", zoo_configs.mixtral, "", ()), tmp_path / "moe")
    runner = Runner(ModelConfig(str(source), "cpu"), SmoothQuant(), calib=CALIB)
    for run in (runner.plan, runner.run):
        with pytest.raises(SettingError, match=r"experts, whose activations.*\n.*--skip 'experts'"):
            run()


@pytest.mark.parametrize("method", ["w8a8", "smoothquant", "llm-int8"])
def test_a_comparison_refuses_experts_before_it_measures_anything(text, tmp_path, method):
    import zoo_configs

    source = zoo.save(zoo.Row("moe", zoo_configs.mixtral, "", ()), tmp_path / "moe")
    rows = tmp_path / "rows.jsonl"
    comparison = compare.Comparison(
        ModelConfig(str(source), "cpu"),
        methods=("rtn", method),
        wbits=(4,),
        groupsizes=(32,),
        calib=str(text),
        text=str(text),
        nsamples=2,
        seqlen=32,
    )
    with pytest.raises(SettingError, match="are experts"):
        comparison.run(rows)
    assert not rows.read_text()


def test_the_model_of_a_run_rounds_what_its_layers_read(source):
    config = ModelConfig(str(source), "cpu")
    model = Runner(config, SmoothQuant(), calib=CALIB).run().model
    layer, raw, seen = model.model.layers[1].mlp.down_proj, [], []
    layer.register_forward_pre_hook(lambda m, x: raw.append(x[0]), prepend=True)
    layer.register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
    with torch.no_grad():
        model(CALIB)
        (given,), ((x, y),) = raw, seen
        assert not torch.equal(given, x) and torch.equal(x, rounded(given))
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias))


class Cut(BaseException):
    """What ends a run."""


@pytest.mark.parametrize("row", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_run_that_was_cut_off_goes_on(tmp_path, row, block):
    """Byte for byte: norms that were folded are in the journal, and batches saw what they make."""
    source = zoo.save(ROWS[row], tmp_path / "model")

    def run(out, cut=None):
        def progress(step):
            if step.block == cut:
                raise Cut

        said = []
        how = {"calib": CALIB, "output": tmp_path / out, "notice": said.append}
        Runner(ModelConfig(str(source), "cpu"), SmoothQuant(), progress=progress, **how).run()
        return said

    run("whole")
    blocks = len(RunRecord.read(tmp_path / "whole" / "optq.json").blocks)
    if block >= blocks:
        pytest.skip("has fewer blocks")
    with pytest.raises(Cut):
        run("cut", cut=block)
    assert any(f"going on after {block} of {blocks} blocks" in line for line in run("cut"))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    again = Runner(ModelConfig(str(source), "cpu"), SmoothQuant(), calib=CALIB).run()
    again.save(tmp_path / "kept")
    assert contents(tmp_path / "kept") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The bundled model with outlier channels, text to measure on, and what it predicts."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    plain, tokenizer = ModelConfig("demo", "cpu", "float32").load()
    windows = evaluation_tokens("demo", tokenizer, 256)[:6]
    outliers.plant(folder, outliers.largest_channels(windows), 8)
    config = ModelConfig(str(folder), "cpu", "float32")
    with torch.no_grad():
        assert torch.equal(config.load()[0](windows[:1]).logits, plain(windows[:1]).logits)
    return config, windows, predictions(plain, [windows])[0]


def test_planted_outliers(planted):
    """What the three papers say of them, on one model."""
    config, windows, dense = planted

    def far(model):
        return divergence(model, dense, windows).mean

    def run(quantizer):
        return Runner(config, quantizer, calib="demo", nsamples=8, seqlen=256).run().model

    noise = far(ModelConfig(config.model_id, "cpu").load()[0])  # bfloat16
    plain, smoothed = far(run(SmoothQuant(alpha="off"))), far(run(SmoothQuant()))
    weights = far(run(GPTQ(8)))
    model = config.load()[0]
    LLMInt8().apply(model, find_blocks(model))
    parted = far(model)
    assert plain > 20 * noise
    assert smoothed < 0.2 * plain
    assert weights < 1.5 * noise
    assert parted < 0.05 * plain and parted < smoothed


def test_a_comparison(source, text, tmp_path, capsys):
    comparison = compare.Comparison(
        ModelConfig(str(source), "cpu"),
        methods=("rtn", "w8a8", "smoothquant", "llm-int8", "prune-2:4"),
        wbits=(8, 4),
        groupsizes=(32,),
        calib=str(text),
        text=str(text),
        nsamples=4,
        seqlen=32,
        speed=True,
    )
    rows = comparison.run(tmp_path / "rows.jsonl")
    assert [(row.method, row.wbits, row.abits) for row in rows] == [
        ("none", 32, None), ("rtn", 8, None), ("rtn", 4, None),
        ("w8a8", 8, 8), ("smoothquant", 8, 8), ("llm-int8", 8, 8), ("prune-2:4", 16, None),
    ]  # fmt: skip
    assert [row.method for row in rows if not row.tokens_per_second] == ["llm-int8"]
    assert all(8 < row.bits_per_weight < 9 for row in rows[3:-1])
    assert [row.sparsity for row in rows if row.sparsity is not None] == [0.5]
    assert all(row.divergence > 0 for row in rows[1:])
    assert comparison.run(tmp_path / "rows.jsonl") == rows
    from dataclasses import asdict

    compared.show([asdict(row) for row in rows])
    shown = capsys.readouterr().out
    assert all(each in shown for each in ("tokens/s", "LLM.int8()", "8/8", "SparseGPT, 2:4", "50%"))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_without_bitsandbytes(source, tmp_path, optq):
    code, out, err = optq("quantize", source, tmp_path / "out", "--method", "llm-int8")
    assert code == 2 and not out and not (tmp_path / "out").exists()
    assert err.splitlines() == [
        "optq: LLM.int8() runs through the package bitsandbytes, which is not installed",
        "      run `pip install bitsandbytes accelerate`",
    ]


def test_what_llm_int8_does_not_take(source, tmp_path, optq):
    for words in (("--wbits", "4"), ("--groupsize", "32"), ("--calib", "demo"), ("--plain",)):
        code, _, err = optq("quantize", source, tmp_path / "out", "--method", "llm-int8", *words)
        assert code == 2 and f"llm-int8 has no {words[0]}" in err


def test_a_checkpoint_that_is_loaded_multiplies_integers(source, tmp_path):
    config = ModelConfig(str(source), "cpu")
    result = Runner(config, SmoothQuant(), calib=CALIB, output=tmp_path / "out").run()
    for model in (result.model, load(tmp_path / "out", "cpu")):
        names = {m.product.name for m in model.modules() if hasattr(m, "product")}
        assert names == {"int8_tokens"}
