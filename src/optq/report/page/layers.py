"""Where each layer of a record stands: block, kind, expert; and what the page is told of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from optq.record import LayerRecord, RunRecord
from optq.report.page import pack
from optq.report.tables import expert_in, shared

DETAILED = 20_000  # layers whose histograms, and their sites' diagonals, are in the page
NUMBERS = (
    *("rows", "cols", "wbits", "error", "relative_error", "damp", "damp_tries", "tokens"),
    *("dead_columns", "fallback_rows", "borrowed", "calls", "at_ends", "scale_min", "scale_max"),
)
INSIDE = re.compile(r"(.*?\.\d+)\.(.+)")  # a block, and a layer's name inside


@dataclass(frozen=True)
class Place:
    """A layer by the indices of its block and kind, and its number if it is an expert's."""

    block: int
    kind: int
    expert: int | None


class Places:
    """Blocks and kinds of layers of one model, in the order in which they come."""

    def __init__(self, layers: Sequence[LayerRecord]) -> None:
        self.blocks: dict[str, int] = {}
        self.kinds: dict[str, int] = {}
        self.every = [self._place(layer) for layer in layers]

    def _place(self, layer: LayerRecord) -> Place:
        block, inside, expert = parts(layer)
        return Place(
            self.blocks.setdefault(block, len(self.blocks)),
            self.kinds.setdefault(inside, len(self.kinds)),
            expert,
        )

    def block_labels(self) -> list[str]:
        """The number of each; the whole name where that says too little."""
        found = [re.search(r"(\d+)$", block) for block in self.blocks]
        short = [each[1] if each else block for each, block in zip(found, self.blocks, strict=True)]
        return short if len({*short}) == len(short) else list(self.blocks)

    def kind_labels(self) -> list[str]:
        """Each by the last parts of its name that tell it from the others."""
        return tails(list(self.kinds))


def parts(layer: LayerRecord) -> tuple[str, str, int | None]:
    """The block, the name inside it with ``*`` for an expert's number, and that number."""
    block = layer.block
    if block is None:  # of version 1
        found = INSIDE.fullmatch(layer.name)
        block = found[1] if found else layer.name
    inside = layer.name.removeprefix(f"{block}.") if layer.name != block else layer.name
    expert = expert_in(layer.name)
    if expert is None:
        return block, inside, None
    return block, f"{expert[1].removeprefix(f'{block}.')}.*.{expert[3]}", int(expert[2])


def tails(names: list[str]) -> list[str]:
    """Names cut to their last parts, as few as tell each from all others."""
    labels = []
    for name in names:
        words = name.split(".")
        for count in range(1, len(words) + 1):
            tail = words[-count:]
            if sum(other.split(".")[-count:] == tail for other in names) == 1:
                break
        labels.append(" ".join("experts" if word == "*" else word for word in tail))
    experts = [".*." in name for name in names]
    return [
        f"experts {label}" if is_expert and "experts" not in label else label
        for label, is_expert in zip(labels, experts, strict=True)
    ]


def cells(layers: Sequence[LayerRecord], places: Places) -> list[dict[str, Any]]:
    """The heat map's: a layer each, or one projection of all experts of a block.

    ``error`` is the relative error, the worst one's; ``mean`` theirs; ``left`` the share of
    the baseline's error that is left, of all together; ``layer`` the worst one's index.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for index, place in enumerate(places.every):
        members.setdefault((place.block, place.kind), []).append(index)
    found = []
    for (block, kind), here in members.items():
        those = [layers[index] for index in here]
        worst = max(here, key=lambda index: layers[index].relative_error)
        rounding = sum(layer.rtn_error for layer in those)
        ends = [layer.at_ends for layer in those if layer.at_ends is not None]
        bits = {layer.wbits for layer in those}
        found.append(
            {
                "block": block,
                "kind": kind,
                "layers": len(here),
                "layer": worst,
                "error": pack.rounded(layers[worst].relative_error),
                "mean": pack.rounded(fmean(layer.relative_error for layer in those)),
                "left": pack.rounded(sum(x.error for x in those) / rounding) if rounding else None,
                "ends": pack.rounded(fmean(ends)) if ends else None,
                "bits": bits.pop() if len(bits) == 1 else None,
            }
        )
    return found


def columns(record: RunRecord, places: Places) -> dict[str, Any]:
    """All layers and sites, packed; ``detailed`` says of how many there are histograms."""
    layers = record.layers
    sites = {site.site: index for index, site in enumerate(record.sites)}
    found = {name: pack.column([getattr(layer, name) for layer in layers]) for name in NUMBERS}
    found["left"] = pack.column(
        [layer.error / layer.rtn_error if layer.rtn_error else None for layer in layers]
    )
    found["block"] = pack.column([place.block for place in places.every])
    found["kind"] = pack.column([place.kind for place in places.every])
    found["expert"] = pack.column([place.expert for place in places.every])
    found["site"] = pack.column([sites.get(layer.site or "") for layer in layers])
    worst = sorted(range(len(layers)), key=lambda i: -layers[i].relative_error)[:DETAILED]
    shown = {*worst}
    bins = [len(layer.histogram) if i in shown else 0 for i, layer in enumerate(layers)]
    codes = [pack.shares(layer.histogram) for i, layer in enumerate(layers) if bins[i]]
    of_shown = {layers[index].site for index in worst}
    kept = [site.diagonal if site.site in of_shown else [] for site in record.sites]
    levels = [pack.levels(diagonal) for diagonal in kept]
    return {
        "count": len(layers),
        "detailed": len(shown),
        "columns": found,
        "bins": pack.column(bins),
        "codes": pack.text(np.concatenate(codes)) if codes else "",
        "runs": pack.column([len(diagonal) for diagonal in kept]),
        "levels": pack.text(np.concatenate([each for each, _, _ in levels])) if levels else "",
        "lowest": pack.column([low for _, low, _ in levels]),
        "highest": pack.column([high for _, _, high in levels]),
    }


def worst(record: RunRecord, count: int) -> list[dict[str, Any]]:
    """The layers of the largest relative error; one for each block and projection of experts."""
    found: dict[tuple[str, str], tuple[int, LayerRecord]] = {}
    for index, layer in enumerate(record.layers):
        block, inside, _ = parts(layer)
        if (block, inside) not in found or (
            layer.relative_error > found[block, inside][1].relative_error
        ):
            found[block, inside] = index, layer
    ranked = sorted(found.values(), key=lambda pair: -pair[1].relative_error)[:count]
    if not ranked:
        return []
    prefix = shared(layer.name for _, layer in ranked)
    return [
        {
            "index": index,
            "name": layer.name,
            "short": layer.name.removeprefix(prefix.partition("layers.")[0]),
            "error": layer.relative_error,
            "left": layer.error / layer.rtn_error if layer.rtn_error else None,
        }
        for index, layer in ranked
    ]


def typical(record: RunRecord) -> float | None:
    """The median of the relative errors."""
    return median(x.relative_error for x in record.layers) if record.layers else None


def baseline(record: RunRecord) -> str:
    """What the errors of its layers stand beside."""
    return "round-to-nearest" if record.zeros is None else "magnitude"


def widths(record: RunRecord) -> str:
    """How many bits layers have, with how many weights have each where that differs."""
    weights: Counter[int] = Counter()
    for layer in record.layers:
        weights[layer.wbits or record.quantizer.get("wbits") or 0] += layer.rows * layer.cols
    if not weights:
        return f"{record.quantizer.get('wbits') or 'unknown'} bits"
    if len(weights) == 1:
        return f"{next(iter(weights))} bits"
    total = weights.total()
    return ", ".join(f"{n / total:.0%} at {bits} bits" for bits, n in sorted(weights.items()))
