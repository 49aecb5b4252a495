"""Pruning: which weights are removed, and what all methods of doing it have in common.

A *pattern* says how many of neighbouring columns stay, in each row by itself: a share of them, or
``n`` of each ``m`` (2:4 is what sparse units of GPUs multiply). Saliencies say which: those of the
least are removed.

A row never ends worse than by magnitude, which removes the smallest weights and, where weights are
quantized as well, rounds the others: where it would, it takes that (:func:`no_worse`).

Everything is held transposed, ``[cols, rows]``, as the solvers hold it.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optq.core.error import undamped_error
from optq.core.grid import Fitted, Grid, IntegerGrid, Storage
from optq.core.problem import Problem
from optq.core.rounding import Rounded, no_worse, round_groups
from optq.core.solution import Pruned, Solution
from optq.core.solver import Solver
from optq.core.weight import UNCODED, LayerScheme, group_index
from optq.errors import SettingError

BLOCK = 128  # columns of which a share is kept, each time: SparseGPT's
UNSEEN = 1e-12  # what a column without evidence counts, of the mean: they go first, by their size
FEW = 8  # columns of a pattern that are compared each with each


@dataclass(frozen=True)
class Pattern:
    """``kept`` of each ``of`` neighbouring columns; or, where ``of`` is 0, all but a ``share``."""

    share: float  # that is removed
    kept: int = 0
    of: int = 0

    @classmethod
    def of_text(cls, sparsity: Any) -> Pattern:
        """From ``0.5`` or ``2:4``. Raises ``SettingError`` for what is neither."""
        remedy = "choose a share between 0 and 1, such as 0.5, or a pattern such as 2:4"
        found = (
            re.fullmatch(r"(\d+):(\d+)", sparsity.strip()) if isinstance(sparsity, str) else None
        )
        if found:
            kept, of = map(int, found.groups())
            if not 0 < kept < of:
                raise SettingError(f"the sparsity is {sparsity}", remedy)
            return cls(1 - kept / of, kept, of)
        try:
            share = float(sparsity)
        except (TypeError, ValueError):
            share = 0.0
        if isinstance(sparsity, bool) or not 0 < share < 1:
            raise SettingError(f"the sparsity is {sparsity}", remedy)
        return cls(share)

    @property
    def block(self) -> int:
        """Columns whose weights compete with each other in a sweep."""
        return self.of or BLOCK

    def keep(
        self, saliency: Float[Tensor, "cols rows"], first: int = 0, together: int = 1
    ) -> Bool[Tensor, "cols rows"]:
        """What stays of columns that follow ``first`` others: the most salient.

        Of a share, so many rows ``together`` compete with each other (the last may be fewer), and
        blocks that have no whole number of it take turns.
        """
        if self.of:
            return self._of_each(saliency)
        columns, rows = saliency.shape
        whole = rows - rows % together
        if 0 < whole < rows:
            parts = saliency[:, :whole], saliency[:, whole:]
            sizes = together, rows - whole
            found = [self.keep(x, first, n) for x, n in zip(parts, sizes, strict=True)]
            return torch.cat(found, dim=1)
        together = min(together, rows)

        def removed_of(columns: int) -> int:
            return int(self.share * columns * together + 1e-9)

        flat = saliency.unflatten(1, (-1, together)).transpose(0, 1).flatten(1)
        keep = _all_but(flat, removed_of(first + columns) - removed_of(first))
        return keep.unflatten(1, (columns, together)).transpose(0, 1).flatten(1).contiguous()

    def _of_each(self, saliency: Float[Tensor, "cols rows"]) -> Bool[Tensor, "cols rows"]:
        parts = saliency.unflatten(0, (-1, self.of))
        if self.of > FEW:
            gone = parts.argsort(dim=1, stable=True)[:, : self.of - self.kept]
            keep = torch.ones_like(parts, dtype=torch.bool)
            return keep.scatter_(1, gone, False).flatten(0, 1)
        one, other = parts[:, :, None], parts[:, None]
        earlier = torch.ones(self.of, self.of, dtype=torch.bool, device=parts.device).tril(-1)
        rank = ((other < one) | ((other == one) & earlier[..., None])).sum(2)
        return (rank >= self.of - self.kept).flatten(0, 1)


def _all_but(saliency: Float[Tensor, "some count"], removed: int) -> Bool[Tensor, "some count"]:
    """What stays without so many of the least in each line; of equal ones the first go."""
    if removed == 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    keep = saliency > saliency.kthvalue(removed, dim=1, keepdim=True).values
    if int(keep.sum()) == keep.numel() - removed * len(keep):  # no two equal ones at the border
        return keep
    order = saliency.argsort(dim=1, stable=True)
    return keep.fill_(True).scatter_(1, order[:, :removed], False)


@dataclass(frozen=True)
class Uncoded(Grid):
    """All numbers: what a weight that is pruned, and not quantized, can be. Its codes are the mask.

    So ``wbits`` says no more than that there are no codes.
    """

    wbits: int = UNCODED
    groupsize: int = -1

    def fit(
        self,
        group: Tensor,
        storage: Storage,
        importance: Tensor | None = None,
        near: Fitted | None = None,
    ) -> Fitted:
        return group.new_ones(group.shape[1]), group.new_zeros(group.shape[1])

    def snapping(self, zero: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda units: units

    def code(self, units: Tensor, zero: Tensor) -> Tensor:
        return (units != 0).to(torch.uint8)

    def units(self, code: Tensor, zero: Tensor) -> Tensor:
        """1 for what is kept: the values themselves stand beside the codes."""
        return code.to(zero.dtype)


class Baseline(NamedTuple):
    """Pruned by magnitude, and rounded if there are codes; with its error."""

    keep: Bool[Tensor, "cols rows"]
    rounded: Rounded
    error: Float[Tensor, " rows"]


class Pruner(Solver):
    """A method of pruning: a frozen dataclass with these options among its own.

    ``sparsity``: the share of weights that is removed, of each row (:class:`SparseGPT`: of each 64
    rows); or a pattern, ``"2:4"``: so many of each so many neighbouring columns stay. ``wbits``:
    what stays is quantized as well; None for not. The other options mean what they mean for
    :class:`optq.core.gptq.GPTQ`.
    """

    sparsity: float | str
    wbits: int | None  # type: ignore[assignment]  # None: no codes

    def __post_init__(self) -> None:
        super().__post_init__()
        of, size = self.pattern.of, self.groupsize
        if self.wbits is None:
            if size != -1 or self.mse or not self.sym:
                raise SettingError(
                    "groups, range search and zero points are of weights that are quantized",
                    "add wbits, or leave them out",
                )
        elif of and size != -1 and size % of:
            raise SettingError(
                f"groups of {size} columns would part the {self.sparsity} of their columns",
                f"choose a groupsize that {of} divides",
            )

    @cached_property
    def pattern(self) -> Pattern:
        return Pattern.of_text(self.sparsity)

    @property
    def grid(self) -> Grid:
        if self.wbits is None:
            return Uncoded()
        return IntegerGrid(self.wbits, self.groupsize, self.sym, self.mse)

    def scheme(self) -> LayerScheme:
        return LayerScheme(UNCODED if self.wbits is None else self.wbits, self.groupsize, self.sym)

    def check_layer(self, name: str, rows: int, columns: int) -> None:
        """Refuse a layer that the pattern does not fit. Raises ``SettingError``."""
        of = self.pattern.of
        if of and columns % of:
            raise SettingError(
                f"the pattern {self.sparsity} does not divide the {columns} columns of {name}",
                "choose a share such as 0.5, or leave the layer dense with --skip",
            )

    def magnitude(
        self,
        W: Float[Tensor, "cols rows"],
        problem: Problem,
        storage: Storage,
        like: Bool[Tensor, "cols rows"] | None = None,
    ) -> Baseline:
        """What is to beat; with as many weights in each row as ``like`` keeps."""
        if like is None or self.pattern.of:
            keep = self.pattern.keep(W.abs())
        else:
            order = W.abs().T.argsort(dim=1, stable=True)
            place = torch.arange(len(W), device=W.device)
            stays = place >= (len(W) - like.sum(0))[:, None]
            keep = torch.empty_like(stays).scatter_(1, order, stays).T.contiguous()
        rounded = self.rounded(W * keep, problem, storage)
        miss = torch.where(keep, rounded.miss, W)
        return Baseline(keep, rounded, undamped_error(miss, problem.H))

    def rounded(
        self, kept: Float[Tensor, "cols rows"], problem: Problem, storage: Storage
    ) -> Rounded:
        """A weight with zeros, and its grids; a zero is one of the values, and stays."""
        if self.wbits is not None:
            group = group_index(len(kept), self.grid.width(len(kept)), kept.device)
            return round_groups(kept, group, self.grid, storage, problem.importance)
        one = kept.new_ones(1, kept.shape[1])
        values = storage.round_weight(kept)
        return Rounded((values != 0).to(torch.uint8), one, torch.zeros_like(one), kept - values)

    def pruned(
        self,
        W: Float[Tensor, "cols rows"],
        values: Float[Tensor, "cols rows"],
        problem: Problem,
        baseline: Baseline,
        storage: Storage,
    ) -> Solution:
        """``values`` that have no codes, in the place of ``W``; in rows where it serves better, by
        magnitude.
        """
        values = storage.round_weight(values)
        error = undamped_error(W - values, problem.H)
        worse = ~(error <= baseline.error)  # also where a dtype could not hold a value
        other = storage.round_weight(W * baseline.keep)
        differs = (values != other).any(0)
        values = torch.where(worse, other, values).T.contiguous() + 0.0  # no negative zeros
        rows, columns = values.shape
        return Pruned(
            wbits=UNCODED,
            codes=(values != 0).to(torch.uint8),
            scales=values.new_ones(rows, 1),
            zeros=torch.zeros(rows, 1, dtype=torch.uint8, device=values.device),
            g_idx=group_index(columns, columns, values.device),
            grid=self.grid,
            error=torch.where(worse, baseline.error, error),
            rtn_error=baseline.error,
            fell_back=worse & differs,
            values=values,
        )

    def coded(
        self,
        W: Float[Tensor, "cols rows"],
        found: Rounded,
        group: Int[Tensor, " cols"],
        problem: Problem,
        baseline: Baseline,
    ) -> Solution:
        """The same of codes; ``found`` has the miss from ``W``."""
        error = undamped_error(found.miss, problem.H)
        grids = found.scale, found.zero
        solution = self._solution(found.codes, *grids, group, error, baseline.error)
        return no_worse(solution, baseline.rounded, None, error, baseline.error)

    @abstractmethod
    def _solve(
        self, problem: Problem, weight: Tensor, aim: Tensor | None, storage: Storage
    ) -> Solution: ...
