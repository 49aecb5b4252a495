"""Who holds a block's tensors, from its fetch to its drop."""

import copy

import pytest
import torch
import zoo
from torch import nn

from optq.model.blocks import find_blocks
from optq.model.weights import Weights

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
        kept = whole.model.layers[0].get_parameter(name).numel() if "up_proj" in name else 0
        assert parameter.numel() == kept, name
    weights.drop(blocks[1])
    assert not any(p.numel() for block in blocks[:2] for p in block.module.parameters())


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
    with weights.outside_on_device():
        on_device = {name for name, p in model.named_parameters() if p.dtype == torch.float64}
    assert on_device == {"embed.weight"}
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name].data_ptr(), name
        assert parameter.dtype == torch.float32, name
