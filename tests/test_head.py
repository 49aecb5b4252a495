"""The output head is quantized too: as one more site, in each format, and untied where it was."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
import zoo
import zoo_configs as configs
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import optq
import optq.solving
from optq import GPTQ, RTN, ModelConfig, Runner
from optq.budget import Mixed
from optq.cli import app
from optq.errors import ModelError, NumericsError, OptqError, SettingError
from optq.formats import FORMATS
from optq.formats.export import export
from optq.formats.gguf import export_gguf
from optq.formats.whole import Whole
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.head import with_own_head
from optq.model.linear import QuantizedLinear, make_dense
from optq.model.weights import Weights

ROUND = RTN(4, 32)
IDS = zoo.token_ids(4, 24)
MOE = zoo.Row("qwen3_moe", configs.qwen3_moe, "", ())
ROWS = {row.name: row for row in (*zoo.ROWS, MOE)}
TIED = {"opt", "gpt2", "gemma2", "cohere", "llama_tied"}
EMBEDDING = "model.embed_tokens.weight"


def saved(name, folder):
    return zoo.save(ROWS[name], folder / "model")


def runner(folder, quantizer=ROUND, out=None, **options):
    config = ModelConfig(str(folder), "cpu")
    return Runner(config, quantizer, **{"calib": IDS, "output": out, "head": 8} | options)


def settings(out):
    return json.loads((out / "config.json").read_text())


@torch.no_grad()
def logits(model, dense=False):
    if dense:
        make_dense(model)
    return model(IDS).logits


# What is written is what was measured


CASES = [
    ("llama_bfloat16", "gptq", GPTQ(3, 32), True),
    ("llama_tied", "gptq_v2", GPTQ(4, 32, sym=False), True),
    ("opt", "gptq", GPTQ.plain(2, 32), False),
    ("gpt2", "gptq", GPTQ(4, -1), True),
    ("gptj", "compressed-tensors", GPTQ(4, 32), False),  # a bias, which stays
    ("gpt_neox", "gptq", RTN(4, 32), True),  # embed_out on disk
    ("gemma2", "compressed-tensors", RTN(2, 32, sym=False), False),
    ("cohere", "compressed-tensors", GPTQ(8, 32), True),
    ("qwen3_moe", "gptq", GPTQ.plain(4, 32), True),
]


@pytest.mark.parametrize("head", [8, 4])
@pytest.mark.parametrize(("name", "form", "quantizer", "qep"), CASES, ids=lambda c: str(c)[:12])
def test_a_reload_is_what_was_measured(name, form, quantizer, qep, head, tmp_path):
    folder, tied = saved(name, tmp_path), name in TIED
    own = runner(folder, quantizer, format=form, qep=qep, head=head, untie=tied)
    result, out = own.run(), tmp_path / "out"
    record = result.layers[-1]
    assert record.name == "lm_head" and record.rows == 128 and record.tokens == IDS.numel()
    assert 0 < record.error <= record.rtn_error * (1 + 1e-6)
    assert not any(layer.error > layer.rtn_error * (1 + 1e-6) for layer in result.layers)
    assert result.record.head == head and "lm_head" not in result.record.dense

    plan, own.output = own.plan(), out
    written = own.run()
    assert written.bytes == result.bytes == plan.packed_bytes
    assert plan.bits_per_weight == pytest.approx(written.bits_per_weight)
    assert plan.layers == len(result.layers)
    layout = Checkpoint.open(str(out)).layout
    assert plan.bytes == sum(tensor.nbytes for tensor in layout.values())
    assert not any(row.why == "the head" for row in plan.dense)

    loaded = optq.load(out, device="cpu")
    assert type(loaded.get_output_embeddings()) is QuantizedLinear
    before, after = result.model.lm_head.weight, loaded.lm_head.weight
    assert torch.equal(after.to(before.dtype), before)
    assert torch.equal(logits(loaded, dense=True), logits(result.model))
    embeddings = loaded.get_input_embeddings().weight
    original = optq.load(folder, device="cpu").get_input_embeddings().weight
    assert torch.equal(embeddings, original) and embeddings is not loaded.lm_head.weight
    if tied:
        assert settings(out)["tie_word_embeddings"] is False


@pytest.mark.parametrize("head", [8, 4])
@pytest.mark.parametrize("name", ["llama_bfloat16", "opt", "gptj", "gpt_neox", "qwen3_moe"])
def test_transformers_reads_it_from_compressed_tensors(name, head, tmp_path):
    folder, out = saved(name, tmp_path), tmp_path / "out"
    own = runner(folder, format="compressed-tensors", head=head, untie=name in TIED)
    result = own.run()
    result.save(out)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(theirs), logits(result.model))
    assert torch.equal(theirs.lm_head.weight, result.model.lm_head.weight)


def test_what_configs_say(tmp_path):
    folder = saved("llama", tmp_path)

    def config(name, **options):
        out = tmp_path / name
        runner(folder, out=out, **options).run()
        return settings(out)["quantization_config"]

    other = config("other")
    assert other["lm_head"] is True and other["bits"] == 4
    assert [*other["dynamic"]] == [r"+:^lm_head$"]
    assert other["dynamic"][r"+:^lm_head$"]["bits"] == 8
    same = config("same", head=4)
    assert same["lm_head"] is True and "dynamic" not in same
    skipped = config("skipped", skip="v_proj")
    assert {"+:^lm_head$", r"-:^model\.layers\.0\.self_attn\.v_proj$"} <= {*skipped["dynamic"]}
    assert ["lm_head"] not in skipped["modules_in_block_to_quantize"]
    none = config("none", head=None)
    assert none["lm_head"] is False and "dynamic" not in none

    def groups(name, **options):
        found = config(name, format="compressed-tensors", **options)
        return found["ignore"], [
            (group["weights"]["num_bits"], group["targets"])
            for group in found["config_groups"].values()
        ]

    assert groups("ct other") == ([], [(4, ["Linear"]), (8, ["lm_head"])])
    assert groups("ct same", head=4) == ([], [(4, ["lm_head", "Linear"])])
    assert groups("ct none", head=None) == (["lm_head"], [(4, ["Linear"])])


def test_what_the_run_says_of_readers(tmp_path):
    folder, said = saved("llama", tmp_path), []
    for form in FORMATS:
        runner(folder, format=form, notice=said.append).run()
    assert len(said) == 2 and all("does not read a packed head" in line for line in said)


@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors"])
def test_another_format_takes_it_along(form, tmp_path):
    folder, out, other = saved("llama_tied", tmp_path), tmp_path / "out", tmp_path / "other"
    runner(folder, out=out, untie=True).run()
    assert export(Checkpoint.open(str(out)), other, FORMATS[form]) == 22
    ours, theirs = (optq.load(each, device="cpu") for each in (out, other))
    assert torch.equal(logits(ours, dense=True), logits(theirs, dense=True))
    assert settings(other)["tie_word_embeddings"] is False


def test_a_model_that_has_both_though_its_config_ties_them(tmp_path):
    """transformers takes the file's head, if it is another; what is written says so."""
    folder, out = saved("llama_tied", tmp_path), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    twice = tensors | {"lm_head.weight": tensors[EMBEDDING].clone()}
    save_file(twice, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingError, match="is its embeddings"):
        runner(folder).run()
    runner(folder, out=tmp_path / "untied", untie=True).run()
    save_file(
        tensors | {"lm_head.weight": tensors[EMBEDDING] + 1},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    assert runner(folder, out=out).plan().layers == 22  # nobody looks at values for it
    runner(folder, out=out).run()
    assert settings(out)["tie_word_embeddings"] is False
    head = optq.load(out, device="cpu").lm_head.weight
    assert (head - tensors[EMBEDDING] - 1).abs().max() < 0.05


def test_embeddings_that_the_file_has_as_the_head(tmp_path):
    folder, out = saved("llama_tied", tmp_path), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    values = tensors.pop(EMBEDDING)
    tensors["lm_head.weight"] = values
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    runner(folder, out=out, untie=True).run()
    assert torch.equal(load_file(out / "model.safetensors")[EMBEDDING], values)


# How it comes about


def test_no_logits_are_computed(tmp_path, monkeypatch):
    row = zoo.Row("wide", lambda: configs.llama(vocab_size=160), "", ())
    folder, own = zoo.save(row, tmp_path / "model"), nn.Linear.forward

    def forward(self, x):
        assert self.out_features != 160
        return own(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    assert runner(folder, qep=True, quantizer=GPTQ(4, 32)).run().layers[-1].rows == 160


@pytest.mark.parametrize("untie", [False, True])
def test_the_head_is_in_memory_while_it_is_used(untie, tmp_path, monkeypatch):
    folder, there = saved("llama_tied" if untie else "llama", tmp_path), []
    fetch, drop = Weights.fetch, Weights.drop

    def look(weights, block):
        there.append((block.name, not weights.model.lm_head.weight.is_meta))

    def fetched(self, block):
        look(self, block)
        fetch(self, block)
        look(self, block)

    def dropped(self, block):
        drop(self, block)
        look(self, block)

    monkeypatch.setattr(Weights, "fetch", fetched)
    monkeypatch.setattr(Weights, "drop", dropped)
    runner(folder, out=tmp_path / "out", untie=untie).run()
    assert there[-3:] == [("lm_head", False), ("lm_head", True), ("lm_head", False)]
    assert not any(here for _, here in there[:-3]) and len(there) == 12


def test_rows_are_solved_in_portions(tmp_path, monkeypatch):
    folder, options = saved("llama", tmp_path), {"qep": True, "quantizer": GPTQ(4, 32)}
    whole = runner(folder, **options).run().model.lm_head.weight
    monkeypatch.setattr(optq.solving, "PORTION", 40 * 64 * 64)
    monkeypatch.setattr(optq.solving, "LEAST", 64)
    assert torch.equal(runner(folder, **options).run().model.lm_head.weight, whole)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][100, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=r"the weight of lm_head \(block 3\) holds NaN"):
        runner(folder, **options).run()


class Cut(BaseException):
    """What ends a run."""


@pytest.mark.parametrize("block", [1, 3])
def test_a_run_goes_on_in_front_of_the_head(block, tmp_path):
    folder, out, said, steps = saved("llama_tied", tmp_path), tmp_path / "out", [], []
    options = {"qep": True, "untie": True, "quantizer": GPTQ(4, 32)}

    def progress(step):
        steps.append(step.block)
        if step.block == block and len(steps) < 14:
            raise Cut

    alone = tmp_path / "alone"
    runner(folder, out=alone, **options).run()
    with pytest.raises(Cut):
        runner(folder, out=out, progress=progress, **options).run()
    steps += [block] * 14
    runner(folder, out=out, progress=progress, notice=said.append, **options).run()
    assert any(f"going on after {block} of 4 blocks" in line for line in said)
    assert {*steps[-2:]} == {2, 3} if block == 1 else steps[-1] == 3
    for name in ("model.safetensors", "config.json", "optq.json"):
        assert (alone / name).read_bytes() == (out / name).read_bytes()


def test_a_run_goes_on_behind_the_head(tmp_path, monkeypatch):
    folder, out, alone = saved("llama", tmp_path), tmp_path / "out", tmp_path / "alone"
    runner(folder, out=alone).run()
    with monkeypatch.context() as patch:
        patch.setattr(Whole, "appear", lambda _: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            runner(folder, out=out).run()
    with pytest.raises(OptqError, match="head was 8 and is 4"):
        runner(folder, out=out, head=4).run()
    monkeypatch.setattr(Flow, "run", lambda _: pytest.fail("it runs"))
    runner(folder, out=out).run()
    for name in ("model.safetensors", "config.json", "optq.json"):
        assert (alone / name).read_bytes() == (out / name).read_bytes()


# Refused before any work


def test_what_contradicts_the_model_is_refused(tmp_path, monkeypatch):
    tied, own = saved("llama_tied", tmp_path / "tied"), saved("llama", tmp_path / "own")
    for folder, options, cause, remedy in (
        (tied, {}, "is its embeddings, which stay as they are", "--untie gives it a head"),
        (own, {"untie": True}, "has a head of its own already", "leave out --untie"),
        (own, {"untie": True, "head": None}, "--untie is for a quantized head", "add --head 8"),
        (own, {"head": 3}, "a head of 3 bits is asked for", "choose --head 8 or 4"),
    ):
        for act in (Runner.run, Runner.plan):
            with pytest.raises(SettingError) as refusal:
                act(runner(folder, out=tmp_path / "out", calib="no-such-text", **options))
            assert cause in refusal.value.cause and remedy in refusal.value.remedy
    with pytest.raises(SettingError, match=r"--bits-per-weight 3\.5 are those of the blocks'"):
        runner(own, Mixed(3.5)).run()
    for head in (None, nn.Embedding(8, 8)):
        kind = transformers.LlamaForCausalLM
        monkeypatch.setattr(kind, "get_output_embeddings", lambda _, head=head: head)
        with pytest.raises(ModelError, match=r"is (none|a Embedding), no nn.Linear.*\n.*--head"):
            runner(own).run()


def test_a_head_that_does_not_fit_the_format(tmp_path):
    row = zoo.Row("odd", lambda: configs.llama(vocab_size=130), "", ())
    folder = zoo.save(row, tmp_path / "model")
    with pytest.raises(SettingError) as refusal:
        runner(folder, head=4).run()
    assert "lm_head cannot be packed at 4 bits: 130 rows" in refusal.value.cause
    assert "misfits: 1 of 22 layers" in refusal.value.cause
    remedy = refusal.value.remedy
    assert "--format compressed-tensors" in remedy and "leave out --head" in remedy
    assert "--skip" not in remedy and "--wbits" not in remedy
    runner(folder, head=4, format="compressed-tensors").run()


def test_nothing_else_than_the_head_says_that_it_is_untied(tmp_path):
    checkpoint = Checkpoint.open(str(saved("gemma2", tmp_path)))
    assert with_own_head(checkpoint, None) is checkpoint
    made = with_own_head(checkpoint, 8, untie=True)
    assert {*made.files} - {*checkpoint.files} == {"lm_head.weight"}
    assert made.config() == checkpoint.config() | {"tie_word_embeddings": False}
    (head, embedding) = (dict(made.tensors([name]))[name] for name in ("lm_head.weight", EMBEDDING))
    assert torch.equal(head, embedding)
    assert [name for name, _ in made.tensors()].count("lm_head.weight") == 1


# The command, and llama.cpp's file


def test_the_command(tmp_path):
    out, untied = tmp_path / "out", ["--untie", "--groupsize", "128", "--wbits", "3"]
    few = ["--nsamples", "2", "--seqlen", "64", "--device", "cpu", "--method", "rtn", "--json"]
    refused = CliRunner().invoke(app, ["quantize", "demo", str(out), "--head", "8", *few])
    assert isinstance(refused.exception, SettingError) and "--untie" in refused.exception.remedy
    command = ["quantize", "demo", str(out), "--head", "8", *few, *untied]
    planned = CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False)
    made = CliRunner().invoke(app, command, catch_exceptions=False)
    plan, told = json.loads(planned.stdout), json.loads(made.stdout)
    assert plan["head"] == told["head"] == 8 and plan["blocks"] == 4
    assert plan["packed_bytes"] == told["bytes"]
    assert told["layers"][-1]["name"] == "lm_head"
    shown = CliRunner().invoke(app, ["inspect", str(out), "--json"], catch_exceptions=False)
    what = json.loads(shown.stdout)
    assert what["bits"] == 3 and what["other_schemes"] == 1
    assert what["quantized_layers"] == 29 and what["quantized_bytes"] == told["bytes"]
    other = ["export", str(out), str(tmp_path / "x"), "--format", "gptq_v2", "--head", "8"]
    refused = CliRunner().invoke(app, other)
    assert "has no --head" in refused.exception.cause
    assert "quantize with --head" in refused.exception.remedy


def exported(checkpoint, file, **options):
    export_gguf(Checkpoint.open(str(checkpoint)), file, **options)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def values(tensor):
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))


def near(tensor, weight, bits):
    """Each value within half of the widest step that its block can need; better than plain."""
    blocks, found = weight.float().view(-1, 32), values(tensor).view(-1, 32)
    step = 2 * blocks.abs().amax(1, keepdim=True) / (2**bits - 1)
    plain = (blocks / step - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    rough = (blocks - step * plain).square().sum()
    return (blocks - found).square().sum() <= rough


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model, tied, rounded; and with a head of its own."""
    folder, tokens = tmp_path_factory.mktemp("head"), IDS
    for name, options in {"tied": {}, "own": {"head": 8, "untie": True}}.items():
        options |= {"calib": tokens, "output": folder / name}
        Runner(ModelConfig("demo", "cpu"), RTN(4, 32), **options).run()
    return folder


@pytest.mark.parametrize(("head", "kind"), [(None, "BF16"), (8, "Q8_0"), (4, "Q4_0")])
def test_gguf_takes_embeddings_that_are_the_head(bundled, tmp_path, head, kind):
    tensors = exported(bundled / "tied", tmp_path / "x.gguf", head=head)
    assert "output.weight" not in tensors
    found, dense = tensors["token_embd.weight"], optq.load(bundled / "tied", device="cpu")
    weight = dense.get_input_embeddings().weight.data
    assert found.tensor_type.name == kind and values(found).shape == weight.shape
    assert near(found, weight, head) if head else torch.equal(values(found), weight.float())


@pytest.mark.parametrize("head", [None, 4])
def test_gguf_takes_a_quantized_head_as_it_is(bundled, tmp_path, head):
    tensors = exported(bundled / "own", tmp_path / "x.gguf", head=head)
    embeddings, output = tensors["token_embd.weight"], tensors["output.weight"]
    assert embeddings.tensor_type.name == ("Q4_0" if head else "BF16")
    assert output.tensor_type.name == "Q8_0"
    read = optq.formats.reader.read_layer(Checkpoint.open(str(bundled / "own")), "lm_head")
    assert torch.equal(values(output), read.weight)


def test_gguf_rounds_a_head_that_is_not_quantized(bundled, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bundled / "tied", model)
    tensors = load_file(model / "model.safetensors")
    head = torch.randn_like(tensors[EMBEDDING].float()).bfloat16()
    save_file(tensors | {"lm_head.weight": head}, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    made = exported(model, tmp_path / "x.gguf", head=4)
    assert near(made["output.weight"], head, 4)
    assert near(made["token_embd.weight"], tensors[EMBEDDING], 4)
    with pytest.raises(SettingError, match="a head of 3 bits is asked for"):
        exported(model, Path(tmp_path / "y.gguf"), head=3)
    assert not (tmp_path / "y.gguf").exists()
