"""What is written down of layers and sites as they are solved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optq.core.error import total
from optq.core.solution import Solution
from optq.core.weight import UNCODED, QuantizedWeight
from optq.model.blocks import Site
from optq.model.layer import Layer
from optq.record import LayerRecord, SmoothingRecord
from optq.solving import Outcome

BINS = 16  # of a histogram of codes, at most


def grids(weight: QuantizedWeight) -> dict[str, Any]:
    """What a layer's record says of its codes and scales."""
    if weight.wbits == UNCODED:
        return {}
    counts = torch.bincount(weight.codes.flatten(), minlength=2**weight.wbits)
    ends = (counts[0] + counts[-1]).item() / weight.codes.numel()
    bins = min(len(counts), BINS)
    low, high = weight.scales.aminmax()
    return {
        "histogram": counts.view(bins, -1).sum(1).tolist(),
        "at_ends": ends,
        "scale_min": low.item(),
        "scale_max": high.item(),
    }


def smoothing_of(site: Site) -> SmoothingRecord | None:
    """What the record says of it; None where activations are left alone."""
    if site.unsmoothed:
        return SmoothingRecord(unsmoothed=site.unsmoothed)
    if site.smoothing is None:
        return None
    made = site.smoothing
    return SmoothingRecord(alpha=made.alpha, error=made.error, plain_error=made.plain)


def layer_record(
    site: Site,
    layer: Layer,
    part: Solution,
    energies: Tensor,
    outcome: Outcome,
    site_rows: int,
    pruned: bool,
) -> LayerRecord:
    rows, cols = layer.shape
    error, energy = total(part.error), total(energies)
    return LayerRecord(
        name=layer.name,
        block=site.block.name,
        site=site.layers[0].name,
        rows=rows,
        cols=cols,
        wbits=part.wbits,
        error=error,
        relative_error=error / energy if energy else 0.0,
        rtn_error=total(part.rtn_error),
        damp=outcome.damp,
        seconds=sum(outcome.seconds.values()) * rows / site_rows,
        damp_tries=outcome.damp_tries,
        dead_columns=outcome.dead_columns,
        fallback_rows=int(part.fell_back.sum()),
        tokens=outcome.tokens,
        borrowed=outcome.borrowed,
        calls=layer.calls,
        sparsity=(part.weight == 0).float().mean().item() if pruned else None,
        **grids(part),
    )
