"""What a solver returns: a quantized weight, and its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optq.core.grid import Grid
from optq.core.weight import QuantizedWeight, dequantize

BY_ROW = ("codes", "scales", "zeros", "error", "rtn_error", "fell_back")


@dataclass(frozen=True)
class Solution(QuantizedWeight):
    """One layer, or the stacked layers of one site, on the values of ``grid``.

    ``error`` is ``(W - Q) H (W - Q)^T`` row by row with ``H`` not damped: the mean squared output
    error per token; ``rtn_error`` the same of round-to-nearest on a grid with the same options (a
    row's may be off by a few percent, where it is far above); ``fell_back`` marks the rows where
    rounding was the better of the two.
    """

    grid: Grid
    error: Float[Tensor, " rows"]
    rtn_error: Float[Tensor, " rows"]
    fell_back: Bool[Tensor, " rows"]

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        """The values of the codes, in the dtype of the scales."""
        return dequantize(self.codes, self.scales, self.zeros, self.g_idx, self.grid.decode)

    @property
    def by_row(self) -> tuple[str, ...]:
        """The tensors that have a row for each of the weight's."""
        return BY_ROW

    def cpu(self) -> Solution:
        """The same, there."""
        names = (*self.by_row, "g_idx")
        return replace(self, **{name: getattr(self, name).cpu() for name in names})

    def split(self, rows: Sequence[int]) -> list[Solution]:
        """The solutions of the stacked layers, which have so many rows each."""
        parts = zip(*(getattr(self, name).split(rows) for name in self.by_row), strict=True)
        return [self._with(part) for part in parts]

    @classmethod
    def cat(cls, parts: Sequence[Solution]) -> Solution:
        """The inverse of :meth:`split`: layers of one site, solved one by one, stacked."""
        names = parts[0].by_row
        return parts[0]._with([torch.cat([getattr(p, name) for p in parts]) for name in names])

    def _with(self, tensors: Sequence[Tensor]) -> Solution:
        changes: dict[str, Any] = dict(zip(self.by_row, tensors, strict=True))
        return replace(self, **changes)


@dataclass(frozen=True)
class Pruned(Solution):
    """A pruned weight without codes: see :class:`optq.core.weight.SparseWeight`.

    ``rtn_error`` is that of pruning by magnitude, which ``fell_back`` rows have taken.
    """

    values: Float[Tensor, "rows cols"]

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        return self.values

    @property
    def by_row(self) -> tuple[str, ...]:
        return (*BY_ROW, "values")
