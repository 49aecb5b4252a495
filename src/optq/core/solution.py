"""What a solver returns: codes, grids, and how large the error became."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """One layer, or the stacked layers of one site, on their grids.

    ``error`` is ``(W - Q) H (W - Q)^T`` row by row with ``H`` not damped: the mean squared output
    error per token; ``rtn_error`` the same of round-to-nearest on a grid with the same options.
    """

    wbits: int
    sym: bool
    codes: UInt8[Tensor, "rows cols"]
    scales: Float[Tensor, "rows groups"]
    zeros: UInt8[Tensor, "rows groups"]
    g_idx: Int[Tensor, " cols"]  # int32: the group of each column
    error: Float[Tensor, " rows"]
    rtn_error: Float[Tensor, " rows"]
    damp: float = 0.0  # the d of H + d I that was used
    damp_tries: int = 0  # factorizations that failed before it
    dead: int = 0  # input columns that are always zero
    fallback_rows: int = 0  # rows where rounding was better than the sweep
    seconds: dict[str, float] = field(default_factory=dict)  # factor, solve

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        """The dequantized weights ``s * (c - z)``, in the dtype of the scales."""
        return dequantize(self.codes, self.scales, self.zeros, self.g_idx)

    def split(self, rows: list[int]) -> list[Solution]:
        """The solutions of the stacked layers, which have so many rows each."""
        parts, start = [], 0
        for count in rows:
            part = slice(start, start + count)
            start += count
            parts.append(
                replace(
                    self,
                    codes=self.codes[part],
                    scales=self.scales[part],
                    zeros=self.zeros[part],
                    error=self.error[part],
                    rtn_error=self.rtn_error[part],
                )
            )
        return parts


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor) -> Tensor:
    """``s * (c - z)`` for codes ``[rows, cols]`` and grids ``[rows, groups]``, in ``s``'s dtype."""
    (rows, columns), groups = codes.shape, scales.shape[1]
    weight, zeros = codes.to(scales.dtype), zeros.to(scales.dtype)
    width = -(-columns // groups)
    if columns == groups * width and torch.equal(g_idx, group_index(columns, width, g_idx.device)):
        grouped = weight.view(rows, groups, width)  # no copy of the grids for each weight
        return grouped.sub_(zeros[:, :, None]).mul_(scales[:, :, None]).view(rows, columns)
    group = g_idx.long()
    return weight.sub_(zeros[:, group]).mul_(scales[:, group])


def group_index(columns: int, width: int, device: torch.device) -> Tensor:
    """``k // width`` for each column ``k``, int32."""
    return (torch.arange(columns, device=device) // width).to(torch.int32)
