"""Gradients block by block are those of the whole model, for every row of the zoo."""

import pytest
import torch
import zoo
import zoo_configs as configs
from torch.nn.functional import cross_entropy

from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.sensitivity import gradients, handed_on, metrics
from optq.model.shards import open_model

CPU = torch.device("cpu")


def found(folder, batches):
    model, blocks, shards = open_model(Checkpoint.open(str(folder)), find_blocks)
    return gradients(model, blocks, shards, batches, CPU)


def expected(model, batches):
    """Of the whole model at once."""
    generator, tokens = torch.Generator().manual_seed(0), sum(ids.numel() for ids in batches)
    layers = [layer for block in find_blocks(model) for layer in block.layers]
    total = {}
    for ids in batches:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, -2).float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        cross_entropy(logits, labels, reduction="sum").backward()
        for layer in layers:
            if (gradient := layer.parameter.grad) is not None:
                squares = layer.of(gradient).square().sum(1) / (2 * tokens)
                total[layer.name] = total.get(layer.name, 0) + squares
    return total


@pytest.mark.parametrize("row", zoo.ROWS + zoo.MULTIMODAL, ids=lambda row: row.name)
def test_gradients_are_those_of_the_whole_model(row, tmp_path):
    batches = [zoo.token_ids(2, 16), zoo.token_ids(1, 16, seed=1)]
    own = {layer.name: value for layer, value in found(zoo.save(row, tmp_path), batches).items()}
    wanted = expected(row.build(), batches)
    assert own.keys() == wanted.keys()
    tolerance = 1e-3 if row.dtype == torch.float32 else 5e-2
    for name, value in wanted.items():
        torch.testing.assert_close(own[name], value.float(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", ["llama_bfloat16", "mixtral", "gpt2", "opt"])
def test_metrics_are_those_of_the_whole_model(name, tmp_path):
    rows = {row.name: row for row in zoo.ROWS}
    row = rows.get(name) or zoo.Row(name, getattr(configs, name), "", ())
    batches = [zoo.token_ids(2, 16), zoo.token_ids(1, 16, seed=1)]
    model, blocks, shards = open_model(Checkpoint.open(str(zoo.save(row, tmp_path))), find_blocks)
    own = metrics(model, blocks, shards, batches, CPU)

    model, generator = row.build(), torch.Generator().manual_seed(0)
    made, wanted = [], [0] * len(own)

    def keep(module, args, output):
        made.append(handed_on(output))
        made[-1].retain_grad()

    for block in find_blocks(model):
        block.module.register_forward_hook(keep)
    for ids in batches:
        made.clear()
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, -2).float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        cross_entropy(logits, labels, reduction="sum").backward()
        for index, each in enumerate(made):
            g = each.grad.flatten(0, -2).float()
            wanted[index] = wanted[index] + g.T @ g / (2 * 48)
    tolerance = 1e-3 if row.dtype == torch.float32 else 5e-2
    for found_, wanted_ in zip(own, wanted, strict=True):
        error = (found_ - wanted_).norm() / wanted_.norm()
        assert error < tolerance
