"""Which tensors of a checkpoint stay as they are, and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from optq.model.blocks import Block, linears_outside
from optq.model.checkpoint import Checkpoint
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


@dataclass(frozen=True)
class LeftOver:
    """The linear layers that stay dense, by name on disk: inside the blocks, and elsewhere.

    ``replaced`` are tensors of the source that others stand for: fused ones, or packed ones.
    """

    inside: list[str]
    outside: Sequence[str] = ()
    replaced: Collection[str] = ()


def left_over(
    checkpoint: Checkpoint,
    on_disk: dict[str, str],
    model: Any,
    blocks: list[Block],
    packed: Collection[str],
) -> LeftOver:
    """What of a model is not quantized.

    ``packed`` are the names on disk of the others, ``on_disk`` what :func:`disk_names` found.
    Elsewhere are the head, towers, projections, and each matrix on disk that the model does not
    load: layers for drafts, a value head. Inside are routers too, which are no linear layers.
    """
    matrices = [n for n, t in checkpoint.layout.items() if n.endswith(".weight") and t.ndim == 2]
    others = sorted({*matrices} - {*on_disk.values()})
    routers = (
        f"{block.name}.{name}"
        for block in blocks
        for name, module in block.module.named_modules()
        if (block.banks or block.dense) and not isinstance(module, nn.Linear | nn.Embedding)
        if on_disk.get(f"{block.name}.{name}.weight") in matrices
    )

    def dense(linears: Iterable[str]) -> list[str]:
        names = [on_disk.get(f"{n}.weight", n).removesuffix(".weight") for n in linears]
        return [name for name in names if name not in packed]

    inside = dense([*(name for block in blocks for name in block.linears), *routers])
    banks = [bank for block in blocks for bank in block.banks if bank.layers[0].solved]
    of_experts = (layer for bank in banks for layer in bank.layers)
    fused = {f"{x.name.rsplit('.', 2)[0]}.{x.attribute}" for x in of_experts}
    replaced = [on_disk[name] for name in fused if name in on_disk]
    return LeftOver(inside, dense([*linears_outside(model, blocks), *others]), replaced)
