"""Grids: the values ``s * (c - z)`` that the weights of one group can take.

A grid is fitted to a group of columns of a row: ``groupsize`` consecutive columns share one
scale ``s`` and one zero point ``z``; codes ``c`` are integers in ``0 .. 2**wbits - 1``.

* min-max (the default of the GPTQ paper): ``s = (max - min) / (2**wbits - 1)`` over the group
  with 0 inside the range, ``z = round(-min / s)``; symmetric: ``z = 2**(wbits - 1)`` and
  ``s = 2 max|w| / (2**wbits - 1)``. The paper's code takes ``max - min`` for the symmetric scale
  of a group whose weights all have one sign, which clips that group to half of its range; this
  one does not.
* range search (``mse=True``): keep, for each group, the grid with the least
  ``sum_k h_k (w_k - q_k)**2``, where ``h`` is the diagonal of the Hessian. The range is multiplied
  by the factors ``COARSE``, then the best one's ends move by the steps ``FINE``: each end by
  itself where the zero point is free, which searches scale and zero point together. A symmetric
  scale is tried with both signs: a negative one mirrors the range, so that its extra level
  ``-2**(wbits - 1)`` serves the longer tail. (docs/log.md has it beside the reference code's.)

A scale is rounded to what a file keeps BEFORE any code is taken with it: codes taken with an
unrounded scale would decode to other weights after a reload.

Weights arrive transposed, ``[columns, rows]``, because the solvers hold them so: then one column
is contiguous, and a reduction over a group runs over whole vectors of rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from optq.core.compiled import MAGIC, by_rows, numbers, serves
from optq.errors import SettingError

BITS = (2, 3, 4, 8)
COARSE = (1.0, 0.78, 0.56, 0.34)  # of the min-max range, which comes first
FINE = (0.08, 0.04)  # moves of the best range's ends, in the same measure
MARGIN = 1e-5  # of the loss: what two grids differ by is more than the last bits of a sum
WEIGHTS_AT_ONCE = 2**19  # searched on a CPU: 2 MB; fewer cost more calls than the cache saves


Fitted = tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]  # scale and zero point of each row


@dataclass(frozen=True)
class Storage:
    """What a file keeps of a grid.

    ``scale_dtypes``: a stored scale is exact in every one of them (``()``: any value at all).
    ``min_zero``: the smallest zero point the file can hold. ``weight_dtype``: that of a weight
    that has no grid, because it is pruned and no more; None: any value at all.
    """

    scale_dtypes: tuple[torch.dtype, ...] = (torch.float16,)
    min_zero: int = 0
    weight_dtype: torch.dtype | None = None

    def round_weight(self, values: Tensor) -> Tensor:
        """The values that a file keeps of a weight without a grid."""
        return (
            values if self.weight_dtype is None else values.to(self.weight_dtype).to(values.dtype)
        )

    def round(self, scale: Tensor) -> Tensor:
        """The stored value nearest to each scale, of the same sign; never 0 and never infinite."""
        limits = sorted(map(torch.finfo, self.scale_dtypes), key=lambda limit: limit.eps)
        size = scale.abs()
        if limits:  # the largest value of one dtype need not be exact in another
            size = size.clamp(max=min(limit.max for limit in limits) * (1 - limits[-1].eps))
        for limit in reversed(limits):
            # Coarse mantissa first: what is exact in bfloat16 stays exact in float16, also
            # among its subnormals, but not the other way round.
            size = size.clamp(min=limit.smallest_normal * limit.eps)
            size = size.to(getattr(torch, limit.dtype)).to(scale.dtype)
        return torch.copysign(size, scale)


class Grid(ABC):
    """A set of values, and how it is fitted to a group: all that a solver knows of either.

    ``scale`` and ``zero`` are what a file keeps of a group. Of a weight ``w`` a grid sees ``w /
    scale``, its *units*: there a set of values is the same for every group, but for ``zero``. A new
    set is one subclass, with a row of its own in the table of solvers that drives the tests.
    """

    wbits: int
    groupsize: int

    def width(self, columns: int) -> int:
        """Columns in a (full) group."""
        return columns if self.groupsize == -1 else min(self.groupsize, columns)

    @property
    def levels(self) -> int | None:
        """The largest code, where values are ``s * (c - z)``: those grids compiled loops know."""
        return None

    @abstractmethod
    def fit(
        self,
        group: Float[Tensor, "width rows"],
        storage: Storage,
        importance: Float[Tensor, "width 1"] | None = None,
        near: Fitted | None = None,
    ) -> Fitted:
        """Scale and zero point of each row of a group, in the dtype of the weights.

        ``importance`` weighs the columns where a range is searched; ``near`` are the grids of much
        the same weights.
        """

    @abstractmethod
    def snapping(self, zero: Tensor) -> Callable[[Tensor], Tensor]:
        """The function that moves units, in place, each to the nearest that is a value."""

    @abstractmethod
    def code(self, units: Tensor, zero: Tensor) -> UInt8[Tensor, ...]:
        """The codes of units that are values."""

    @abstractmethod
    def units(self, code: Tensor, zero: Tensor) -> Tensor:
        """The inverse of :meth:`code`, in the dtype of ``zero``."""

    def nearest(
        self, weight: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[UInt8[Tensor, ...], Tensor]:
        """The code and the value nearest to each weight."""
        units = self.snapping(zero)(weight / scale)
        return self.code(units, zero), units.mul_(scale)

    def decode(self, code: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The value of each code."""
        return self.units(code, zero).mul_(scale)


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """``s * (c - z)``, and its options. ``groupsize=-1`` is one group to a row."""

    wbits: int
    groupsize: int = -1
    sym: bool = True
    mse: bool = False

    def __post_init__(self) -> None:
        if not is_int(self.wbits) or self.wbits not in BITS:
            raise SettingError(f"wbits is {self.wbits!r}", "choose 2, 3, 4 or 8")
        if not is_int(self.groupsize) or (self.groupsize != -1 and self.groupsize < 1):
            raise SettingError(
                f"groupsize is {self.groupsize!r}", "choose -1 (one group to a row) or 1 and more"
            )
        for name in ("sym", "mse"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} is {getattr(self, name)!r}", "choose True or False")

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.wbits - 1

    def snapping(self, zero: Tensor) -> Callable[[Tensor], Tensor]:
        if self.sym:
            half = 2 ** (self.wbits - 1)
            return lambda units: units.round_().clamp_(-half, half - 1)
        lowest, highest = -zero, self.levels - zero
        return lambda units: torch.clamp(units.round_(), lowest, highest, out=units)

    def code(self, units: Tensor, zero: Tensor) -> UInt8[Tensor, ...]:
        return (units + zero).to(torch.uint8)

    def units(self, code: Tensor, zero: Tensor) -> Tensor:
        return code.to(zero.dtype).sub_(zero)

    def fit(
        self,
        group: Tensor,
        storage: Storage,
        importance: Tensor | None = None,
        near: Fitted | None = None,
    ) -> Fitted:
        """Min-max, or the range search, which starts from the grids ``near``, where they are
        given, instead of trying the factors COARSE (but not at 2 bits, where the best range moves
        further: 4% of the error on some layers).
        """
        if not self.mse:
            low, high = _ends(group)
            return self._grid(low, high, 1.0, 1.0, storage)
        if importance is None:
            importance = group.new_ones(len(group), 1)
        # Only ratios matter; of these, squares of small misses do not underflow.
        largest = importance.amax().clamp(min=torch.finfo(importance.dtype).tiny)
        importance = (importance / largest).to(group.dtype)
        rows = group.shape[1]
        if self.wbits != 8 and serves(group):  # whose trials are of stored scales
            return self._compiled_search(group.contiguous(), importance, storage, near)
        if group.device.type == "cpu":
            rows = max(1, WEIGHTS_AT_ONCE // len(group))
        found = []
        for first in range(0, group.shape[1], rows):
            some = slice(first, first + rows)
            start = (near[0][some], near[1][some]) if near else None
            found.append(self._search(group[:, some], importance, storage, start))
        scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
        return scale, zero

    def _search(
        self, group: Tensor, importance: Tensor, storage: Storage, near: Fitted | None
    ) -> Fitted:
        low, high = _ends(group)
        # What storing moves a scale by is less than a trial, but not than a step of 8 bits.
        tried = storage if self.wbits == 8 else Storage((), storage.min_zero)
        miss = torch.empty_like(group, memory_format=torch.contiguous_format)

        def trial(below: Tensor, above: Tensor) -> Tensor:
            """The loss and both factors ``[3, rows]`` of one grid for each row."""
            scale, zero = self._grid(low, high, below, above, tried)
            self.snapping(zero)(torch.mul(group, 1 / scale, out=miss))  # dividing costs more
            torch.addcmul(group, miss, scale, value=-1, out=miss)
            return torch.stack([(importance.T @ miss.square_())[0], below, above])

        def better(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(new[0] < old[0] * (1 - MARGIN), new, old)

        whole = torch.ones_like(low)
        best = trial(whole, whole)
        for below, above in self._starts(low, high, near):
            best = better(trial(below, above), best)
        for step in FINE:
            for lower, upper in ((1, 0),) if self.sym else ((1, 0), (0, 1)):
                _, below, above = best
                for move in (step, -step):
                    best = better(trial(below + move * lower, above + move * upper), best)
        return self._grid(low, high, best[1], best[2], storage)

    def _starts(
        self, low: Tensor, high: Tensor, near: Fitted | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Factors of the ends to try after 1, those of the grids ``near`` or else of COARSE."""
        whole = torch.ones_like(low)
        if near is None or self.wbits == 2:
            starts = [(factor * whole, factor * whole) for factor in COARSE[1:]]
        else:
            starts = [self._factors(low, high, near)]
        if not self.sym:
            return starts
        starts = [(whole, whole), *starts]
        return [(sign * below, above) for below, above in starts for sign in (1, -1)][1:]

    def _factors(self, low: Tensor, high: Tensor, near: Fitted) -> tuple[Tensor, Tensor]:
        """By what the ends of the grids ``near`` are those of the weights."""
        scale, zero = near
        if self.sym:
            below = above = scale.abs() * self.levels / (2 * torch.maximum(high, -low))
        else:
            below, above = -zero * scale / low, (self.levels - zero) * scale / high
        # An end at 0 has no factor.
        below, above = (torch.where(end.isfinite(), end, 1) for end in (below, above))
        return below, above

    def _compiled_search(
        self, group: Tensor, importance: Tensor, storage: Storage, near: Fitted | None
    ) -> Fitted:
        """What :meth:`_search` finds, in a compiled loop."""
        low, high = _ends(group)
        factors = group.new_empty(2, 0)
        if near is not None and self.wbits != 2:
            factors = torch.stack(self._factors(low, high, near))
        ends = group.new_empty(2, group.shape[1])
        middle = 2 ** (self.wbits - 1)
        limits = numbers(
            group, self.levels, middle, storage.min_zero, MAGIC[group.dtype], 1 - MARGIN
        )
        moves = (group.new_tensor(each) for each in (COARSE, FINE))
        given = (group, importance[:, 0].contiguous(), low, high, factors, self.sym, *limits)
        by_rows("search", 0, group.shape[1], *given, *moves, ends)
        return self._grid(low, high, ends[0], ends[1], storage)

    def _grid(
        self,
        low: Tensor,
        high: Tensor,
        below: float | Tensor,
        above: float | Tensor,
        storage: Storage,
    ) -> Fitted:
        """Scale and zero point for the ends ``below * low`` and ``above * high``.

        Symmetric: for ``below`` times the larger end, and ``below`` gives the scale its sign.
        """
        if self.sym:
            extent = torch.maximum(high, -low) * 2
            scale = storage.round(extent * below / self.levels).to(low.dtype)
            zero = torch.full_like(scale, 2 ** (self.wbits - 1))
        else:
            low, high = low * below, high * above
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


def _ends(group: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each row, with 0 between them."""
    return group.amin(0).clamp_(max=0), group.amax(0).clamp_(min=0)


def is_int(value: object) -> bool:
    """Whether an option is a whole number: not a float, not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
