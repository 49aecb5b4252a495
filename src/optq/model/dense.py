"""Which tensors of a checkpoint stay as they are, and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from optq.model.blocks import Block, linears_outside
from optq.model.names import renaming

SKIPPED = "left out with --skip"
GATE = "decides for others: a router or a gate"
UNCALLED = "never called"
HEAD = "the head"
EMBEDDING = "embeddings"
TIED = "embeddings, and the head, which is tied to them"
OUTSIDE = "linear layers outside the blocks"
UNLOADED = "not loaded by transformers, as layers for multi-token prediction are"
OTHERS = "norms, biases and others that are no linear layer"


def reasons(
    model: Any,
    blocks: list[Block],
    skip: str | None,
    names: Mapping[str, str],
    on_disk: Collection[str],
    quantized: Collection[str],
) -> dict[str, str]:
    """Why each tensor of ``on_disk`` that a run does not replace stays.

    ``skip`` is what :func:`optq.model.blocks.find_blocks` was given, ``names`` what
    :func:`optq.model.names.disk_names` found, ``quantized`` the names of layers.
    """
    in_model = {place: name for name, place in names.items()}
    layers = {layer.name for block in blocks for layer in block.layers}
    linears = {name for block in blocks for name in block.linears}
    banks = [bank for block in blocks for bank in (*block.banks, *block.dense)]
    fused = {
        f"{bank.name}.{own}": bank.inner[0][0].name
        for bank in banks
        for own in (bank.first, "down_proj")
    }
    modules, state = dict(model.named_modules()), model.state_dict()
    outside, head = {*linears_outside(model, blocks)}, model.get_output_embeddings()
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    sparse = tuple(f"{block.name}." for block in blocks if block.banks or block.dense)
    rename, _ = renaming(model)

    def of_linear(name: str) -> str:
        if name in layers:
            return UNCALLED
        return SKIPPED if skip and re.search(skip, name) else GATE

    def why(place: str) -> str | None:
        name = in_model.get(place)
        if name is None:
            return OTHERS if rename(place)[0] in state else UNLOADED
        module, _, attribute = name.rpartition(".")
        if name in fused:
            return None if fused[name] in quantized else of_linear(fused[name])
        if attribute != "weight":
            return OTHERS
        if module in linears:
            return None if module in quantized else of_linear(module)
        if isinstance(modules[module], nn.Embedding):
            return TIED if name in tied else EMBEDDING
        if modules[module] is head:
            return HEAD
        if module in outside:
            return OUTSIDE
        return GATE if name.startswith(sparse) and state[name].ndim == 2 else OTHERS

    found = {place: why(place) for place in on_disk}
    return {place: reason for place, reason in found.items() if reason is not None}
