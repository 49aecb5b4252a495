"""Who holds a block's tensors, from its fetch to its drop."""

import copy
import gc
import weakref

import pytest
import torch
import zoo
import zoo_configs as configs
from safetensors.torch import load_file, save_file
from torch import nn

from optq import RTN, ModelConfig, Runner
from optq.errors import ModelError
from optq.model import shards
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.experts import Bank
from optq.model.flow import Flow
from optq.model.shards import open_model
from optq.model.source import load_model
from optq.model.weights import Weights
from optq.quantize import Quantization

CPU = torch.device("cpu")


def shared_llama():
    """Two blocks with one ``up_proj``."""
    model = next(row for row in zoo.ROWS if row.name == "llama").build()
    first, second = model.model.layers[:2]
    second.mlp.up_proj = first.mlp.up_proj
    return model, find_blocks(model)


def test_a_dropped_block_keeps_what_a_later_one_shares():
    model, blocks = shared_llama()
    whole = copy.deepcopy(model)
    weights = Weights(model, blocks, CPU, keep=False)
    weights.drop(blocks[0])
    for name, parameter in model.model.layers[0].named_parameters():
        assert parameter.is_meta is ("up_proj" not in name), name
        assert parameter.shape == whole.model.layers[0].get_parameter(name).shape
    weights.drop(blocks[1])
    assert all(p.is_meta for block in blocks[:2] for p in block.module.parameters())


def test_blocks_that_are_kept_stay_whole():
    model, blocks = shared_llama()
    whole = copy.deepcopy(model)
    weights = Weights(model, blocks, CPU)
    for block in blocks:
        weights.fetch(block)
        weights.drop(block)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_fetched_layer_is_memory_of_its_own():
    model, blocks = shared_llama()
    layer = blocks[0].layers[0]
    before = layer.parameter.data
    Weights(model, blocks, CPU).fetch(blocks[0])
    assert torch.equal(layer.parameter.data, before)
    assert layer.parameter.data_ptr() != before.data_ptr()


def test_originals_are_there_inside_and_gone_after_the_last_block_that_needs_them():
    model, blocks = shared_llama()
    layers = [
        layer for layer in blocks[0].layers if "up_proj" in layer.name or "q_proj" in layer.name
    ]
    before = [layer.weight.clone() for layer in layers]
    weights = Weights(model, blocks, CPU)
    weights.hold_originals(layers)
    for layer in layers:
        layer.put(torch.zeros_like(layer.weight))
    with pytest.raises(KeyError), weights.originals():
        assert all(map(torch.equal, (layer.weight for layer in layers), before))
        raise KeyError
    assert not any(layer.weight.any() for layer in layers)
    for count, block in zip([1, 0], blocks, strict=False):
        weights.drop(block)
        assert len(weights._originals) == count


def test_what_is_outside_of_blocks_comes_back_also_where_two_modules_share_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.tied = nn.Embedding(4, 4), nn.Embedding(4, 4)
            self.tied.weight = self.embed.weight
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.head = nn.Linear(4, 4)

        def get_output_embeddings(self):
            return self.head

    model = Model()
    before = {name: p.data for name, p in model.named_parameters()}
    # A dtype stands for the device: tensors move to it just so, and every machine has two.
    weights = Weights(model, find_blocks(model), torch.float64)
    with weights.outside.on_device():
        on_device = {name for name, p in model.named_parameters() if p.dtype == torch.float64}
        model.embed(torch.tensor([0]))
        weights.outside.let_go()
        assert model.embed.weight.dtype == torch.float32
        model.tied(torch.tensor([0]))
        assert model.embed.weight.dtype == torch.float64
    assert on_device == {"embed.weight"}
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name].data_ptr(), name
        assert parameter.dtype == torch.float32, name


# Merged experts, buffers beside them, other names, biases, other layouts on disk, mamba blocks.
STREAMED = ("qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "granite_moe", "jamba", "nemotron_h")


def saved(name, folder):
    model = zoo.Row(name, getattr(configs, name), "", ()).build()
    model.save_pretrained(folder, max_shard_size="100kB")
    return folder


@pytest.mark.parametrize("portion", [1, shards.PORTION])
@pytest.mark.parametrize("name", STREAMED)
def test_a_block_read_alone_is_what_transformers_loads(tmp_path, monkeypatch, name, portion):
    """In every parameter, its dtype and strides; and one block is in memory at a time."""
    monkeypatch.setattr(shards, "PORTION", portion)
    checkpoint = Checkpoint.open(str(saved(name, tmp_path)))
    whole = load_model(checkpoint)
    model, blocks, on_disk = open_model(checkpoint, find_blocks)
    weights = Weights(model, blocks, CPU, keep=False, shards=on_disk)
    inside = {n for block in blocks for n, _ in block.module.named_parameters(block.name)}
    outside = dict(model.named_parameters()).keys() - inside
    assert all(torch.equal(model.get_parameter(n), whole.get_parameter(n)) for n in outside)
    for _ in range(2):  # a block can be fetched again
        for block in blocks:
            assert all(model.get_parameter(n).is_meta for n in inside)
            weights.fetch(block)
            for other in (each for each in blocks if each is not block):
                assert all(parameter.is_meta for parameter in other.module.parameters())
            for n, parameter in block.module.named_parameters(block.name):
                expected = whole.get_parameter(n)
                assert torch.equal(parameter, expected) and parameter.dtype == expected.dtype
                assert parameter.stride() == expected.stride(), n
                assert parameter.untyped_storage().nbytes() == parameter.nbytes, n  # no file's
            weights.drop(block)
    for (n, buffer), (_, expected) in zip(
        model.named_buffers(), whole.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, expected), n
    assert [repr(c) for c in getattr(model, "_weight_conversions", [])] == [
        repr(c) for c in getattr(whole, "_weight_conversions", [])
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_has_one_block_in_memory_and_keeps_what_it_is_asked_to(tmp_path, monkeypatch, keep):
    held, done = [], Quantization.done

    def watched(work, block, error):
        held.append([b.index for b in work.blocks if _any_values(b.module)])
        done(work, block, error)

    monkeypatch.setattr(Quantization, "done", watched)
    source = saved("qwen3_moe", tmp_path / "model")
    output = None if keep else tmp_path / "out"
    tokens = zoo.token_ids(4, 32)
    result = Runner(ModelConfig(str(source), "cpu"), RTN(4, 32), calib=tokens, output=output).run()
    assert held == ([[0], [0, 1]] if keep else [[0], [1]])
    assert not any(parameter.is_meta for parameter in result.model.parameters())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "qwen3"])
def test_embeddings_are_let_go_before_the_first_block_and_the_head_is_not_there(
    tmp_path, monkeypatch, name, keep
):
    row = next(row for row in zoo.ROWS if row.name == name)
    source, seen, done = zoo.save(row, tmp_path / "model"), [], Quantization.done

    def watched(work, block, error):
        shapes = {n: p.numel() for n, p in work.model.named_parameters()}
        seen.append({n for n, size in shapes.items() if not size})
        assert work.model.get_output_embeddings().weight.numel() == 0
        done(work, block, error)

    monkeypatch.setattr(Quantization, "done", watched)
    output = None if keep else tmp_path / "out"
    for dtype in (None, "bfloat16"):  # mapped, and cast
        how = {"calib": zoo.token_ids(4, 32), "output": output, "force": True}
        result = Runner(ModelConfig(str(source), "cpu", dtype), RTN(4, 32), **how).run()
        ours = load_model(Checkpoint.open(str(source), getattr(torch, dtype or "", None)))
        outside = {n: p for n, p in ours.named_parameters() if n in seen[0]}
        assert any("embed" in n or "wte" in n for n in outside)
        for n, parameter in outside.items():
            assert torch.equal(result.model.get_parameter(n), parameter)
    assert len({*map(frozenset, seen)}) == 1


def test_no_tensor_outlives_the_load_but_in_the_model(tmp_path):
    """A file stays mapped, and resident where it was touched, as long as one of them does."""
    checkpoint = Checkpoint.open(str(zoo.save(zoo.ROWS[0], tmp_path)))
    given, tensors = [], Checkpoint.tensors

    def watched(self, names=None):
        for name, tensor in tensors(self, names):
            given.append(weakref.ref(tensor))
            yield name, tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "tensors", watched)
        gc.disable()
        model, _, _ = open_model(checkpoint, find_blocks)
        alive = [tensor for ref in given if (tensor := ref()) is not None]
        gc.enable()
    mine = {id(p) for p in (*model.parameters(), *model.buffers())}
    assert given and all(id(tensor) in mine for tensor in alive)


def test_what_is_called_again_after_the_first_block_comes_back(tmp_path, monkeypatch):
    """As per-layer embeddings are; that a module is, is seen and not declared."""
    row = next(row for row in zoo.ROWS if row.name == "llama")
    source, read = zoo.save(row, tmp_path / "model"), []

    def call_again(model):
        blocks = find_blocks(model)
        for block in blocks:
            module = block.module.self_attn
            module.register_forward_pre_hook(
                lambda *_: read.append(model.model.embed_tokens(torch.tensor([1])).clone())
            )
        return blocks

    model, blocks, on_disk = open_model(Checkpoint.open(str(source)), call_again)
    first = model.model.embed_tokens.weight[1:2].clone()
    weights, gone = Weights(model, blocks, CPU, shards=on_disk), []
    done = [lambda block, error: gone.append(model.model.embed_tokens.weight.numel() == 0)]
    Flow(model, blocks, [zoo.token_ids(2, 16)], weights, list, *done).run()
    assert read and all(torch.equal(each, first) for each in read)
    assert gone == [False] * len(blocks)
    assert torch.equal(model.model.embed_tokens.weight[1:2], first)


def _any_values(module):
    return any(not parameter.is_meta for parameter in module.parameters())


def test_a_kept_model_has_blocks_that_nobody_fetched(tmp_path):
    model, blocks, on_disk = open_model(
        Checkpoint.open(str(saved("mixtral", tmp_path))), find_blocks
    )
    weights = Weights(model, blocks, CPU, shards=on_disk)
    weights.fetch(blocks[0])
    weights.complete()
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("damage", ["cut", "gone", "another"])
def test_a_shard_damaged_after_the_run_began_is_named(tmp_path, damage):
    folder = saved("mixtral", tmp_path)
    model, blocks, on_disk = open_model(Checkpoint.open(str(folder)), find_blocks)
    weights = Weights(model, blocks, CPU, keep=False, shards=on_disk)
    weights.fetch(blocks[0])
    weights.drop(blocks[0])
    for path in folder.glob("*.safetensors"):
        if damage == "gone":
            path.unlink()
            continue
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        data = path.read_bytes()[:-8]
        path.unlink()  # the embedding is still mapped
        if damage == "cut":
            path.write_bytes(data)
        else:
            save_file({name: tensor[..., :-1].contiguous() for name, tensor in state.items()}, path)
    said = {"cut": "truncated or corrupt", "gone": "is missing", "another": "not what it was"}
    with pytest.raises(ModelError, match=said[damage]) as caught:
        weights.fetch(blocks[1])
    assert caught.value.remedy and "\n" not in caught.value.cause


def test_experts_are_tried_before_the_norm_inside_them_has_values():
    from transformers.models.muse_spark import modeling_muse_spark as muse

    config = muse.MuseSparkTextConfig(
        num_local_experts=4, moe_hidden_size=64, moe_intermediate_size=32
    )
    with torch.device("meta"):
        bank = Bank("experts", muse.MuseSparkExperts(config))
    bank.check()
    assert bank.summed and bank.module.post_expert_norm.weight.is_meta
