"""Llama 4's experts: each multiplies a copy of all tokens, zero where a token is not its own."""

import json
import sys

import pytest
import torch
import transformers
import zoo
import zoo_configs as configs
from safetensors.torch import load_file

from optq import GPTQ, ModelConfig, Runner, cli, load
from optq.errors import ModelError
from optq.model.blocks import find_blocks
from optq.model.experts_call import called_through
from optq.model.flow import Flow
from optq.model.linear import QuantizedLinear
from optq.model.weights import Weights

IDS = zoo.token_ids(16, 64)
TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40


def build(chosen=1, dtype=torch.float32):
    return zoo.Row("llama4", lambda: configs.llama4(chosen), "", ()).build().to(dtype)


def logits(model, ids=IDS[:2]):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def experts_of(model):
    return [block.feed_forward.experts for block in model.model.layers]


def read_by(experts, ids, model):
    """The copies that a forward hands to a module of experts, `[experts, tokens, hidden]`."""
    seen = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    logits(model, ids)
    handle.remove()
    return seen[0].view(4, -1, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_with_two_chosen_is_the_model_s_own(dtype):
    model = build(2, dtype)
    expected = logits(model)
    banks = [bank for block in find_blocks(model) for bank in block.banks]

    def compute(bank, x, index, weights):
        routed = bank.routed(index)
        assert sum(len(tokens) for _, tokens in routed.values()) == 2 * 2 * 64
        return bank.combine(x, routed, bank.inside(x, routed), weights)

    with called_through(banks, compute):
        assert torch.equal(logits(model), expected)
    assert all("forward" not in vars(each) for each in experts_of(model))  # taken back


@pytest.mark.parametrize("chosen", [1, 2])
def test_rows_of_zeros_are_no_tokens(chosen, monkeypatch):
    monkeypatch.setattr("optq.model.flow.ENOUGH", 0)  # its own tokens, and no others
    model = build(chosen)
    first = experts_of(model)[0]
    copies = read_by(first, IDS, model)
    blocks, sums_of = find_blocks(model), {}

    def solve(sites):
        sums_of.update({layer.name: sums for site, sums in sites for layer in site.layers})

    weights = Weights(model, blocks, torch.device("cpu"))
    Flow(model, blocks, [*IDS.split(4)], weights, solve).run()
    total = 0
    for expert, copy in enumerate(copies):
        x = copy[copy.abs().sum(-1) > 0].double()
        gate, up = (x @ first.gate_up_proj[expert].double()).split(96, dim=-1)
        inside = up * torch.nn.functional.silu(gate)
        name = f"{blocks[0].banks[0].name}.{expert}"
        total += len(x)
        for part, read in {"gate_proj": x, "up_proj": x, "down_proj": inside}.items():
            sums = sums_of[f"{name}.{part}"]
            assert sums.tokens == len(x) and sums.borrowed == 0
            wanted = read.T @ read / len(x)
            torch.testing.assert_close(sums.H.double(), wanted, rtol=1e-4, atol=1e-5)
    assert total == chosen * IDS.numel()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the model and its packed checkpoint, and what the run says."""
    folder = tmp_path_factory.mktemp("llama4")
    model = build()
    model.save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    options = {"calib": IDS, "qep": True, "format": "compressed-tensors", "output": folder / "out"}
    run = Runner(ModelConfig(str(folder / "model"), "cpu"), GPTQ(4, 32), **options).run()
    return folder, run


def test_a_packed_model_multiplies_only_what_was_routed(made):
    folder, _ = made
    model, rows = load(folder / "out", "cpu"), []
    expected = {layer: read_by(layer, IDS[:2], model) for layer in experts_of(model)}
    for experts in experts_of(model):
        for expert, copy in enumerate(expected[experts]):
            for part in ("gate_proj", "up_proj", "down_proj"):
                layer = experts.get_submodule(f"{expert}.{part}")
                assert isinstance(layer, QuantizedLinear)
                layer.register_forward_pre_hook(
                    lambda _, args, copy=copy: rows.append(
                        len(args[0]) == int((copy.abs().sum(-1) > 0).sum())
                    )
                )
    logits(model)
    assert len(rows) == 2 * 4 * 3 and all(rows)
    rows.clear()
    logits(model, IDS[:1, :1])  # one token: one expert of each block
    assert len(rows) == 2 * 3


def test_names_are_one_for_each_expert_and_none_fused(made):
    folder, run = made
    names = load_file(folder / "out" / "model.safetensors").keys()
    experts = {name for name in names if ".experts." in name}
    assert len(experts) == 2 * 4 * 3 * 3
    assert "model.layers.1.feed_forward.experts.3.gate_proj.weight_packed" in experts
    assert all(layer.tokens for layer in run.layers)


def test_the_commands_take_it(made, monkeypatch, capsys, tmp_path):
    from optq.evaluate import speed

    folder, run = made
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.setattr(speed, "BUFFER", 2**20)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def optq(*words):
        monkeypatch.setattr(sys, "argv", ["optq", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    given = ["--calib", text, "--nsamples", 4, "--seqlen", 32, "--groupsize", 32, "--device", "cpu"]
    there = tmp_path / "there"
    optq("quantize", folder / "model", tmp_path / "gptq", *given)
    optq("export", tmp_path / "gptq", there, "--format", "compressed-tensors")
    assert torch.equal(logits(load(there, "cpu")), logits(load(tmp_path / "gptq", "cpu")))
    assert json.loads(optq("inspect", there, "--json"))["format"] == "compressed-tensors"
    measured = [
        json.loads(optq("eval", each, "--text", text, "--device", "cpu", "--json"))["perplexity"]
        for each in (folder / "model", folder / "out")
    ]
    assert measured[0] != measured[1] == pytest.approx(measured[0], rel=0.1)
    assert optq("generate", folder / "out", "the rest", "--max-new-tokens", 4).strip()
    report = json.loads(optq("bench", folder / "out", "--device", "cpu", "--json"))
    assert sum(shape["layers"] for shape in report["shapes"]) == len(run.layers) == 38
    rows = optq(
        "compare", folder / "model", "--text", text, *given, "--methods", "rtn", "--wbits", "3",
        "--results", tmp_path / "rows.jsonl", "--json",
    )  # fmt: skip
    assert [row["method"] for row in json.loads(rows)["rows"]] == ["none", "rtn"]


def test_an_expert_that_no_token_reached_is_solved_from_its_block_s(tmp_path):
    model = build()
    with torch.no_grad():  # one feature is 5 for every token, and speaks against expert 3
        model.model.embed_tokens.weight[:, 0] = 5
        for block in model.model.layers:
            block.self_attn.o_proj.weight[0] = 0
            block.feed_forward.experts.down_proj[:, :, 0] = 0
            block.feed_forward.shared_expert.down_proj.weight[0] = 0
            block.post_attention_layernorm.weight[0] = 1
            block.feed_forward.router.weight[:, 0] = torch.tensor([0.0, 0, 0, -100])
    model.save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    options = {"calib": IDS, "format": "compressed-tensors", "qep": True}
    run = Runner(ModelConfig(str(tmp_path / "model"), "cpu"), GPTQ(3, 32), **options).run()
    missed = [layer for layer in run.layers if ".experts.3." in layer.name]
    assert len(missed) == 6
    for layer in missed:
        assert layer.tokens == 0 and layer.borrowed > 0 and layer.dead_columns < layer.cols
        assert 0 < layer.error <= layer.rtn_error * (1 + 1e-6)


def test_its_place_in_a_model_that_takes_images(tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "vision_output_dim": 32}
    config = transformers.Llama4Config(
        text_config=configs.llama4().to_dict(),
        vision_config=vision | {"projector_input_dim": 32, "projector_output_dim": 32},
        image_token_index=configs.IMAGE,
    )
    row = zoo.Row("llama4", lambda: config, "", (), auto_class="AutoModelForImageTextToText")
    row.build().save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    options = {"calib": IDS, "format": "compressed-tensors", "output": tmp_path / "out"}
    run = Runner(ModelConfig(str(tmp_path / "model"), "cpu"), GPTQ(4, 32), **options).run()
    assert len(run.layers) == 38
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    prefix = "language_model.model.layers.1.feed_forward.experts"
    assert f"{prefix}.3.down_proj.weight_packed" in names and f"{prefix}.down_proj" not in names
    assert torch.isfinite(logits(load(tmp_path / "out", "cpu"))).all()


def test_other_code_with_the_same_parameters_is_refused(monkeypatch):
    model = build()
    kind = type(experts_of(model)[0])
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
    with pytest.raises(ModelError, match="compute more than their layout says"):
        find_blocks(model)
