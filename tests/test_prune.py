"""Pruning a model: the command, what it writes, who reads that, and what it refuses."""

import json
import sys

import pytest
import safetensors.torch
import torch
import zoo
import zoo_configs as configs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optq import OBS, ModelConfig, Runner, SparseGPT, Wanda, cli
from optq.errors import ModelError, SettingError
from optq.formats.reader import read_layer
from optq.model.checkpoint import Checkpoint
from optq.record import RunRecord

ROWS = {row.name: row for row in zoo.ROWS}
CALIB = zoo.token_ids(6, 48)
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama in bfloat16, with a tokenizer. To be read only."""
    folder = zoo.save(ROWS["llama_bfloat16"], tmp_path_factory.mktemp("prune") / "llama")
    zoo.tokenizer().save_pretrained(folder)
    (folder / "notes.txt").write_text("kept " * 400)
    return folder


def run(source, out, quantizer, qep=True, **options):
    options = {"calib": CALIB} | options
    return Runner(ModelConfig(str(source), "cpu"), quantizer, qep, output=out, **options).run()


def tensors(folder):
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def pattern_holds(weight, kept, of):
    return bool(((weight.reshape(len(weight), -1, of) != 0).sum(2) <= kept).all())


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8"])
def test_a_dense_checkpoint_with_zeros(source, tmp_path, sparsity):
    """The same tensors, dtypes and files; zeros as many as asked; and any program loads it."""
    result = run(source, tmp_path / "out", SparseGPT(sparsity))
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    names = {f"{layer.name}.weight" for layer in result.layers}
    assert names and all(torch.equal(before[n], after[n]) for n in before.keys() - names)
    for name in names:
        assert abs((after[name] == 0).float().mean().item() - 0.5) < 0.01
        if isinstance(sparsity, str):
            assert pattern_holds(after[name], *map(int, sparsity.split(":")))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (tmp_path / "out" / "notes.txt").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(CALIB).logits, result.model(CALIB).logits)
    record = RunRecord.read(tmp_path / "out" / "optq.json")
    assert record.method == "sparsegpt" and record.bits_per_weight == 16
    for layer in record.layers:
        assert abs(layer.sparsity - 0.5) < 0.01 and layer.error <= layer.rtn_error * (1 + 1e-5)


def test_what_is_written_is_what_was_measured(source, tmp_path):
    """Without an output the result keeps the model, saves the same bytes, and has its errors."""
    written = run(source, tmp_path / "one", SparseGPT("2:4"))
    kept = Runner(ModelConfig(str(source), "cpu"), SparseGPT("2:4"), True, calib=CALIB).run()
    kept.save(tmp_path / "two")
    for name, tensor in tensors(tmp_path / "one").items():
        assert torch.equal(tensor, tensors(tmp_path / "two")[name])
    weight = kept.model.get_submodule(LAYER).weight
    assert torch.equal(weight, tensors(tmp_path / "one")[f"{LAYER}.weight"])
    assert [x.error for x in written.layers] == [x.error for x in kept.layers]


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
def test_pruned_and_quantized_codes(source, tmp_path, form):
    run(source, tmp_path / "out", SparseGPT("2:4", 4, 32), format=form)
    checkpoint = Checkpoint.open(str(tmp_path / "out"))
    layer = read_layer(checkpoint, LAYER)
    assert pattern_holds(layer.weight, 2, 4) and layer.wbits == 4
    assert (layer.weight != 0).float().mean() > 0.4


def test_transformers_reads_what_was_pruned_and_quantized(source, tmp_path):
    pytest.importorskip("compressed_tensors")
    result = run(source, tmp_path / "out", SparseGPT(0.5, 4, 32), format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    checkpoint = Checkpoint.open(str(tmp_path / "out"))
    with torch.no_grad():
        for layer in result.layers:
            weight = read_layer(checkpoint, layer.name).weight
            assert (weight == 0).float().mean() > 0.4
            dense.get_submodule(layer.name).weight.copy_(weight)
        assert torch.equal(theirs(CALIB).logits, dense(CALIB).logits)


@pytest.mark.parametrize("name", ["gpt2", "opt_350m", "qwen2", "falcon"])
def test_other_architectures(tmp_path, name):
    """A Conv1D among them, whose weight the file has the other way round."""
    folder = zoo.save(ROWS[name], tmp_path / "model")
    result = run(folder, tmp_path / "out", Wanda("2:4"), qep=False)
    found = tensors(tmp_path / "out")
    assert {n: t.shape for n, t in tensors(folder).items()} == {
        n: t.shape for n, t in found.items()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(CALIB).logits, result.model(CALIB).logits)
    for layer in result.layers:
        module = model.get_submodule(layer.name)
        weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
        assert pattern_holds(weight, 2, 4)


def test_experts(tmp_path):
    """Under the names that the source has; and a source that has them in one tensor is refused."""
    zoo.Row("mixtral", configs.mixtral, "", ()).build().save_pretrained(tmp_path / "mixtral")
    run(tmp_path / "mixtral", tmp_path / "out", SparseGPT("2:4"), qep=False)
    found = tensors(tmp_path / "out")
    assert found.keys() == tensors(tmp_path / "mixtral").keys()
    experts = [t for n, t in found.items() if ".experts." in n]
    assert experts and all(pattern_holds(t, 2, 4) for t in experts)
    zoo.Row("gpt_oss", configs.gpt_oss, "", ()).build().save_pretrained(tmp_path / "gpt_oss")
    with pytest.raises(ModelError, match="is not on disk as one tensor"):
        run(tmp_path / "gpt_oss", tmp_path / "none", SparseGPT(0.5), qep=False)
    assert not (tmp_path / "none").exists()


class Cut(BaseException):
    """What ends a run."""


@pytest.mark.parametrize("name", ["llama_bfloat16", "gpt2"])
def test_a_run_that_was_cut_off_goes_on(tmp_path, name):
    """And writes the very same weights, whichever way the file has them."""
    folder = zoo.save(ROWS[name], tmp_path / "model")
    run(folder, tmp_path / "alone", SparseGPT(0.5))
    last = max(int(x.name.split(".")[2]) for x in run(folder, tmp_path / "n", OBS(0.25)).layers)
    steps = []

    def progress(step):
        steps.append(step.block)
        if cut and step.block == last:
            raise Cut

    cut = True
    with pytest.raises(Cut):
        run(folder, tmp_path / "out", SparseGPT(0.5), progress=progress)
    steps.clear()
    cut = False
    run(folder, tmp_path / "out", SparseGPT(0.5), progress=progress)
    assert {*steps} == {last}
    alone, again = tensors(tmp_path / "alone"), tensors(tmp_path / "out")
    assert all(torch.equal(alone[n], again[n]) for n in alone)


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def command(capfd, monkeypatch, source, tmp_path):
    """Run ``optq`` on the source: exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(name, *words):
        where = (
            [] if name != "prune" else [str(source), "out", "--calib", str(source / "notes.txt")]
        )
        small = [] if name != "prune" else ["--nsamples", "4", "--seqlen", "48"]
        monkeypatch.setattr(sys, "argv", ["optq", name, *where, *map(str, words), *small])
        with pytest.raises(SystemExit) as end:
            cli.main()
        done = capfd.readouterr()
        return end.value.code, done.out, done.err

    return call


def test_the_command(command, tmp_path):
    code, out, _ = command("prune", "--sparsity", "2:4", "--json")
    made = json.loads(out)
    assert code == 0 and made["method"] == "sparsegpt" and made["qep"] and made["format"] == "dense"
    assert all(abs(layer["sparsity"] - 0.5) < 0.01 for layer in made["layers"])
    code, out, _ = command("inspect", "out")
    assert code == 0 and "of magnitude's" in out
    assert out.splitlines()[-1].startswith("next: optq eval out")
    code, out, err = command("report", "out")
    page = (tmp_path / "out" / "optq_report.html").read_text()
    assert code == 0 and err == "" and "Gain over magnitude" in page
    assert "SPARSEGPT, 2:4; calibrated" in page and "not quantized" in page
    assert "50.0% of the weights" in page and "bits a weight" not in page
    assert "of magnitude's error" in page and "ounding" not in page[: page.index("<script>")]
    code, _, err = command("prune", "--sparsity", "0.5")
    assert code == 2 and "out exists" in err
    code, out, err = command("prune", "--sparsity", "0.5", "--wbits", "4", "--force")
    assert code == 0 and "of magnitude's" in out and "(magnitude " in err
    code, out, _ = command("inspect", "out")
    assert code == 0 and "zeros" in out and "sparsegpt" in out
    assert command("report", "out")[0] == 0
    page = (tmp_path / "out" / "optq_report.html").read_text()
    assert "SPARSEGPT, 50% removed, 4 bits, groups of 64; calibrated" in page
    assert "of the weights" in page and "bits a weight" in page and "Gain over magnitude" in page
    code, out, _ = command("prune", "--sparsity", "2:4", "--method", "obs", "--dry-run", "--force")
    assert code == 0 and "next: the same command without --dry-run" in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--sparsity", "1.5"], "the sparsity is 1.5"),
        (["--sparsity", "half"], "the sparsity is half"),
        (["--sparsity", "3:7"], "the pattern 3:7 does not divide the"),
        (["--sparsity", "0.5", "--method", "gptq"], "the method gptq is unknown"),
        (["--sparsity", "0.5", "--groupsize", "64"], "pruning without --wbits has no --groupsize"),
        (["--sparsity", "0.5", "--format", "gptq"], "pruning without --wbits has no --format"),
        (["--sparsity", "0.5", "--method", "wanda", "--plain"], "wanda has no --plain"),
        (
            ["--sparsity", "0.5", "--method", "obs", "--wbits", "4"],
            "obs removes weights, and rounds",
        ),
        (["--sparsity", "0.5", "--wbits", "5"], "wbits is 5"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(command, tmp_path, words, cause):
    code, out, err = command("prune", *words)
    assert code == 2 and out == "" and cause in err
    assert len(err.strip().splitlines()) == 2
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"tune": "blocks"}, "zeros"), ({"head": 8}, "head"), ({"format": "gptq"}, "has no codes")],
)
def test_what_would_not_last_is_refused(source, tmp_path, options, cause):
    with pytest.raises(SettingError, match=cause):
        run(source, tmp_path / "out", SparseGPT(0.5), **options)
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_is_an_error(source, tmp_path):
    folder = tmp_path / "model"
    zoo.save(ROWS["llama_bfloat16"], folder)
    file = next(folder.glob("*.safetensors"))
    damaged = load_file(file)
    damaged[f"{LAYER}.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(damaged, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match="NaN"):
        run(folder, tmp_path / "out", SparseGPT(0.5))
