"""The run record: what a run did, as one typed, versioned document, ``optq.json``.

It holds no times and no paths: same seed, same bytes. Those are in ``optq_times.json`` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from optq.document import STRICT, read, written

FILE = "optq.json"
TIMES = "optq_times.json"
VERSION = 2  # of both documents; files without one are of the first
MANY = 0.1  # of a layer's columns without evidence: worth a warning


class Recorded(BaseModel):
    """A part of a record."""

    model_config = STRICT


class LayerRecord(Recorded):
    """What became of one layer.

    ``error`` is ``tr((W - Q) H (W - Q)^T)``: the mean squared output error per token, summed over
    rows; ``relative_error`` divides it by ``tr(W H W^T)``, ``rtn_error`` is round-to-nearest's.
    These are the solver's; the codes and scales are those of the block when it was done, before
    the scales of the whole model were tuned. Of pruning, ``rtn_error`` is that of removing the
    smallest weights (and rounding the others, if there are codes). What is None was not recorded.
    """

    name: str
    block: str | None = None
    site: str | None = None  # the first of the layers that read the same input
    rows: int
    cols: int
    wbits: int | None = None
    error: float
    relative_error: float
    rtn_error: float
    damp: float
    seconds: float = Field(default=0.0, exclude=True)
    damp_tries: int = 0
    dead_columns: int = 0
    fallback_rows: int = 0
    tokens: int = 0  # that the layer read in calibration
    borrowed: int = 0  # of its block that stood in for tokens that an expert lacked
    calls: int = 1  # of the layer in one forward; it is calibrated on the first
    histogram: list[int] = []  # of the codes, lowest first; of 8 bits 16 codes to a bin
    at_ends: float | None = None  # share of the codes at either end of the grid
    scale_min: float | None = None
    scale_max: float | None = None
    sparsity: float | None = None  # the share of its weights that are 0, where it was pruned


class SmoothingRecord(Recorded):
    """What became of a site whose activations are quantized.

    ``alpha`` is the strength of smoothing (None: none was best), ``error`` that of its product in
    8 bits, relative to its output, on a sample; ``plain_error`` the same without smoothing. A site
    that cannot be smoothed has ``unsmoothed``, the reason, alone.
    """

    alpha: float | None = None
    error: float | None = None
    plain_error: float | None = None
    unsmoothed: str | None = None


class SiteRecord(Recorded):
    """The layers that read one input, by their first, and ``diagonal``: of its Hessian.

    That is in the order of the sweep, as the means of at most 32 equal runs of columns.
    """

    site: str
    layers: list[str]
    diagonal: list[float]
    smoothing: SmoothingRecord | None = None  # where activations are quantized


class BlockRecord(Recorded):
    """A block; ``error`` is how far what leaves it is from full precision.

    That is the squared difference over the squared full-precision hidden states, sums over all
    calibration tokens, of the model quantized up to there. None where that stream did not run.
    """

    block: str
    error: float | None


def without_tokens(layers: list[LayerRecord]) -> str | None:
    """A word about layers that calibration has not reached in many of their columns."""
    blind = [layer for layer in layers if layer.dead_columns > MANY * layer.cols]
    if not blind:
        return None
    worst = max(blind, key=lambda layer: layer.dead_columns / layer.cols)
    return (
        f"{len(blind)} layers have inputs that no calibration token reached, {worst.name}"
        f" {worst.dead_columns} of {worst.cols}: those weights are rounded."
        " More, or more varied, text would reach them"
    )


def unsmoothed(sites: list[SiteRecord]) -> str | None:
    """A word about sites whose activations could not be smoothed, by the ends of their names."""
    why: dict[str, dict[str, None]] = {}
    for site in sites:
        if site.smoothing is not None and site.smoothing.unsmoothed is not None:
            ends = (name.rpartition(".")[2] for name in site.layers)
            why.setdefault(site.smoothing.unsmoothed, {}).update(dict.fromkeys(ends))
    if not why:
        return None
    parts = (f"{', '.join(names)} ({reason})" for reason, names in why.items())
    return f"read in 8 bits and not smoothed: {'; '.join(parts)}"


class Choice(Recorded):
    """The width of layers that have one, within a budget, and why.

    By the widths that the format can hold: ``errors`` are relative to the output, as a layer's
    ``relative_error``; ``divergence`` is the estimate of how far the model's predictions would go
    from full precision's because of these layers alone, in nats a token.
    """

    layers: list[str]
    weights: int
    wbits: int
    bytes: int  # in the file
    errors: dict[int, float]
    divergence: dict[int, float]

    @property
    def sensitivity(self) -> float:
        """Nats a token for each unit of relative error."""
        error = self.errors[self.wbits]
        return self.divergence[self.wbits] / error if error else 0.0


class DistillRecord(Recorded):
    """What the end-to-end tuning of the scales gave.

    ``before`` and ``after`` are the mean divergence, in nats per token, of the predictions on
    ``held_back`` samples of the calibration text from the full-precision model's, both of scales as
    the file has them; None: not finite. What layers' records say is of the scales before it.
    """

    settings: dict[str, Any]
    held_back: int
    steps: int  # that were taken
    before: float | None
    after: float | None
    kept: bool  # else the scales are as they were
    note: str = ""  # why it ended early


class TunedBlock(Recorded):
    """What tuning a block gave.

    ``before`` and ``after`` are its error on samples held back, an estimate in nats a token of how
    far the predictions diverge because of it, both of what the file has; None: not finite. What
    layers' records say is of the codes and scales before it.
    """

    block: str
    steps: int  # that were taken
    before: float | None
    after: float | None
    moved: float  # of all codes
    kept: bool  # else the block is as it was
    note: str = ""  # why it ended early


class Found(Recorded):
    """What a run has found out about one block."""

    block: BlockRecord
    layers: list[LayerRecord] = []
    sites: list[SiteRecord] = []
    tuned: TunedBlock | None = None


class Times(Recorded):
    """Where the time of a run went, in seconds, and what it ran on; of a run that was cut off and
    went on, that of the last part.
    """

    version: int = VERSION
    optq: str
    model: str
    calib: str
    device: str
    threads: int
    seconds: dict[str, float]  # by stage, and in all
    layers: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> Times:
        """The times in a file. Raises :class:`ModelError` for a damaged one, or a newer version."""
        return read(cls, path, VERSION, "only the times of the run are lost")


class RunRecord(Recorded):
    """One run: its settings, what it was calibrated on, and what became of each layer."""

    version: int = VERSION
    optq: str  # the version that ran
    method: str
    quantizer: dict[str, Any]
    qep: dict[str, Any] | None
    calibration: dict[str, Any]
    bits_per_weight: float  # of the quantized layers as stored, scales and all
    bytes: int  # of the quantized layers in the file
    head: int | None = None  # bits of the head, where it is quantized
    dense: list[str]  # linear layers inside the blocks that stay as they were
    layers: list[LayerRecord]
    sites: list[SiteRecord] = []
    blocks: list[BlockRecord] = []
    choices: list[Choice] | None = None  # of widths, where there was a budget
    tune: dict[str, Any] | None = None  # how blocks and scales were tuned
    tuned: list[TunedBlock] = []
    distilled: DistillRecord | None = None

    @property
    def zeros(self) -> float | None:
        """The share of weights that are 0 in the layers that were pruned; None: none were."""
        pruned = [layer for layer in self.layers if layer.sparsity is not None]
        total = sum(layer.rows * layer.cols for layer in pruned)
        zeros = sum((layer.sparsity or 0.0) * layer.rows * layer.cols for layer in pruned)
        return zeros / total if total else None

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """The record in a file. Raises :class:`ModelError` for a damaged one, or a newer version"""
        return read(cls, path, VERSION, "only its errors by layer are lost")

    def text(self) -> str:
        """What the file says."""
        return written(self)
