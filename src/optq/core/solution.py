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

    def split(self, rows: Sequence[int]) -> list[Solution]:
        """The solutions of the stacked layers, which have so many rows each."""
        parts = zip(*(getattr(self, name).split(rows) for name in BY_ROW), strict=True)
        return [self._with(part) for part in parts]

    @classmethod
    def cat(cls, parts: Sequence[Solution]) -> Solution:
        """The inverse of :meth:`split`: layers of one site, solved one by one, stacked."""
        return parts[0]._with([torch.cat([getattr(p, name) for p in parts]) for name in BY_ROW])

    def _with(self, tensors: Sequence[Tensor]) -> Solution:
        changes: dict[str, Any] = dict(zip(BY_ROW, tensors, strict=True))
        return replace(self, **changes)
