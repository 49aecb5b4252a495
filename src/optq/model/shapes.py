"""The shapes that a run's memory and time depend on, of a model without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optq.errors import ModelError
from optq.model.blocks import Block, Site
from optq.model.checkpoint import Checkpoint
from optq.model.layer import Layer
from optq.model.scout import Held, scout


@dataclass(frozen=True)
class SiteShape:
    """``count`` problems of ``rows x columns`` each: one, or as many as there are experts."""

    rows: int
    columns: int
    count: int = 1

    @property
    def weights(self) -> int:
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class BlockShape:
    """``bytes`` of all its weights, ``stacked`` of those that are merged from others as they are
    read, ``largest`` layer in weights, ``packed`` bytes in the file."""

    bytes: int
    stacked: int
    largest: int
    packed: int
    sites: tuple[SiteShape, ...]


def sites_of(
    model: Any, blocks: list[Block], seqlen: int, said: list[str]
) -> tuple[dict[Block, list[Site]], Held, int | None]:
    """The sites and how many they are; None, and a word of why, where a run has to find them."""
    try:
        sites, held = scout(model, blocks, seqlen)
    except ModelError as error:
        said.append(f"{error.cause}: {error.remedy}")
    else:
        return sites, held, sum(map(len, sites.values()))
    sites = {}
    for block in blocks:
        of_banks = {layer for bank in block.banks for layer in bank.layers}
        sites[block] = [Site(block, [layer]) for layer in block.layers if layer not in of_banks]
        for bank in block.banks:
            for experts in (bank.inner, bank.down):
                flat = [layer for own in experts for layer in own]
                sites[block].append(Site(block, flat, bank=bank, experts=experts))
    widest = max(layer.shape[1] for block in blocks for layer in block.layers)
    hidden = model.get_input_embeddings().weight.shape[1]
    item = seqlen * model.dtype.itemsize
    held = Held(hidden * item, (3 * hidden + widest) * item, (4 * hidden + 3 * widest) * item)
    return sites, held, None


def shape_of(
    block: Block,
    sites: list[Site],
    packed: Callable[[Layer], int],
    names: Mapping[str, str],
    checkpoint: Checkpoint,
) -> BlockShape:
    shapes, merged = [], 0
    for site in sites:
        problems = site.experts or [site.layers]
        rows = sum(layer.shape[0] for layer in problems[0])
        shapes.append(SiteShape(rows, problems[0][0].shape[1], len(problems)))
        first = problems[0][0]
        stacked = site.bank and site.experts is site.bank.inner and len(problems[0]) > 1
        if stacked and names[f"{first.name}.weight"] in checkpoint.layout:
            merged += first.parameter.nbytes
    layers = [layer for site in sites for layer in site.layers]
    return BlockShape(
        bytes=sum(parameter.nbytes for parameter in block.module.parameters()),
        stacked=merged,
        largest=max((layer.shape[0] * layer.shape[1] for layer in layers), default=0),
        packed=sum(map(packed, layers)),
        sites=tuple(shapes),
    )


def outside(
    checkpoint: Checkpoint,
    model: Any,
    blocks: list[Block],
    names: Mapping[str, str],
    why: Mapping[str, str],
) -> dict[str, int]:
    """What lies outside the blocks, in bytes, and the largest tensor that is written as it is."""
    inside = {p for block in blocks for p in block.module.parameters()}
    own = {n: p for n, p in model.named_parameters() if p not in inside}
    head = getattr(model.get_output_embeddings(), "weight", None)
    cast = [
        p.nbytes
        for name, p in own.items()
        if name in names and checkpoint.layout[names[name]].dtype != p.dtype
    ]
    return {
        "outside": sum(p.nbytes for p in own.values() if p is not head),
        "cast": sum(cast),
        "dense": max((checkpoint.layout[name].numel() for name in why), default=0),
    }
