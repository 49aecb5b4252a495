"""Grids: the values ``s * (c - z)`` that the weights of one group can take.

A grid is fitted to a group of columns of a row: ``groupsize`` consecutive columns share one
scale ``s`` and one zero point ``z``; codes ``c`` are integers in ``0 .. 2**wbits - 1``.

* min-max (the default of the GPTQ paper): ``s = (max - min) / (2**wbits - 1)`` over the group
  with 0 inside the range, ``z = round(-min / s)``; symmetric: ``z = 2**(wbits - 1)`` and
  ``s = 2 max|w| / (2**wbits - 1)``. The paper's code takes ``max - min`` for the symmetric scale
  of a group whose weights all have one sign, which clips that group to half of its range; this
  one does not.
* range search (``mse=True``): shrink that range by the factors ``SHRINK`` and keep, for each
  group, the one with the least ``sum |w - q|**2.4`` (the search of the GPTQ reference code).

A scale is rounded to what a file keeps BEFORE any code is taken with it: codes taken with an
unrounded scale would decode to other weights after a reload.

Weights arrive transposed, ``[columns, rows]``, because the solvers hold them so: then one column
is contiguous, and a reduction over a group runs over whole vectors of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from optq.errors import SettingError

BITS = (2, 3, 4, 8)
SHRINK = tuple(1 - 0.02 * step for step in range(41))  # 1.0, 0.98, .. 0.2: widest first
NORM = 2.4  # the exponent of the search: punishes far misses more than least squares does


@dataclass(frozen=True)
class Storage:
    """What a file keeps of a grid.

    ``scale_dtypes``: a stored scale is exact in every one of them (``()``: any value at all).
    ``min_zero``: the smallest zero point the file can hold.
    """

    scale_dtypes: tuple[torch.dtype, ...] = (torch.float16,)
    min_zero: int = 0

    def round(self, scale: Tensor) -> Tensor:
        """The stored value nearest to each scale; never 0 and never infinite."""
        limits = sorted(map(torch.finfo, self.scale_dtypes), key=lambda limit: limit.eps)
        if limits:  # the largest value of one dtype need not be exact in another
            scale = scale.clamp(max=min(limit.max for limit in limits) * (1 - limits[-1].eps))
        for limit in reversed(limits):
            # Coarse mantissa first: what is exact in bfloat16 stays exact in float16, also
            # among its subnormals, but not the other way round.
            scale = scale.clamp(min=limit.smallest_normal * limit.eps)
            scale = scale.to(getattr(torch, limit.dtype)).to(scale.dtype)
        return scale


@dataclass(frozen=True)
class GridSpec:
    """The options of a grid. ``groupsize=-1`` is one group to a row."""

    wbits: int
    groupsize: int = -1
    sym: bool = True
    mse: bool = False

    def __post_init__(self) -> None:
        if self.wbits not in BITS:
            raise SettingError(f"wbits is {self.wbits}", "choose 2, 3, 4 or 8")
        if self.groupsize != -1 and self.groupsize < 1:
            raise SettingError(
                f"groupsize is {self.groupsize}", "choose -1 (one group to a row) or 1 and more"
            )

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.wbits - 1

    def width(self, columns: int) -> int:
        """Columns in a (full) group."""
        return columns if self.groupsize == -1 else min(self.groupsize, columns)

    def fit(
        self, group: Float[Tensor, "*groups width rows"], storage: Storage
    ) -> tuple[Float[Tensor, "*groups rows"], Float[Tensor, "*groups rows"]]:
        """Scale and zero point of each row of each group, in the dtype of the weights."""
        low = group.amin(-2).clamp_(max=0)
        high = group.amax(-2).clamp_(min=0)
        best_scale, best_zero = self._range(low, high, storage)
        if self.mse:
            best = self._loss(group, best_scale, best_zero)
            for shrink in SHRINK[1:]:
                scale, zero = self._range(low * shrink, high * shrink, storage)
                loss = self._loss(group, scale, zero)
                better = loss < best
                best_scale = torch.where(better, scale, best_scale)
                best_zero = torch.where(better, zero, best_zero)
                best = torch.where(better, loss, best)
        return best_scale, best_zero

    def _range(self, low: Tensor, high: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
        if self.sym:
            extent = torch.maximum(high, -low) * 2
            scale = storage.round(extent / self.levels).to(low.dtype)
            zero = torch.full_like(scale, 2 ** (self.wbits - 1))
        else:
            extent = high - low
            scale = storage.round(extent / self.levels).to(low.dtype)
            zero = torch.round(-low / scale)
            if storage.min_zero:
                narrow = storage.round(high / (self.levels - storage.min_zero)).to(low.dtype)
                lifted = zero < storage.min_zero
                scale = torch.where(lifted & (high > 0), narrow, scale)
            zero = zero.clamp_(storage.min_zero, self.levels)
        nothing = extent == 0
        return scale.masked_fill_(nothing, 1), zero.masked_fill_(nothing, 2 ** (self.wbits - 1))

    def _loss(self, group: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        scale, zero = scale.unsqueeze(-2), zero.unsqueeze(-2)
        miss = torch.clamp(torch.round(group / scale), -zero, self.levels - zero)
        return miss.mul_(scale).sub_(group).abs_().pow_(NORM).sum(-2)
