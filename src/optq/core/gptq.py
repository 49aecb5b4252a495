"""GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023), without the inverse.

The paper sweeps the columns in one order for all rows: round column ``j``, then spread its error
over the columns not yet rounded. It does so with ``R = cholesky(H^-1, upper)``. Factoring
``H = U U^T`` with ``U`` upper triangular gives the same: ``R = U^-1``, and with
``N = U / diag(U)`` (unit upper triangular)

    w^_j = w_j + sum_{i<j} e_i N[i, j]      q_j = quant(w^_j)      e_j = w_j - q_j

where ``e`` is taken from the ORIGINAL weight. One Cholesky instead of Cholesky, inverse,
Cholesky; and the damped error of a row comes for free as ``sum_j U_jj^2 (w^_j - q_j)^2``. It is
Babai's nearest-plane algorithm.

Departures from the paper:

1. The sums are formed by halving: sweep the left half of a range, add its errors to the right
   half with ONE matrix product, sweep the right half. The paper's lazy blocks of 128 are the same
   idea with one level; halving makes the products as square as they can be.
2. ``W^`` holds partial sums here, not the paper's updated weights. A grid fitted in mid-sweep
   (dynamic groups) needs the latter: for the group ``G`` that starts at column ``a`` they are
   ``W[:, G] + P N[G, G]^-1`` with ``P = sum_{i<a} e_i N[i, G]``, one small triangular solve.
   Ranges are halved on group boundaries so that ``P`` is complete when a group starts.
3. No row ends worse than rounding: where it would, it takes the rounded codes and their grid.
4. Everything is held transposed: a column of ``W`` is one contiguous vector over rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from optq.core.descent import polish
from optq.core.error import (
    compare_with_rounding,
    damped_error,
    factored_error,
    undamped_error,
    weighted_squares,
)
from optq.core.grid import Grid, Storage, is_int
from optq.core.order import ActOrder
from optq.core.precision import quick_dtype
from optq.core.problem import Factor, Problem
from optq.core.rounding import Rounded, no_worse, round_groups, working_copy
from optq.core.solution import Solution
from optq.core.solver import Solver
from optq.core.tiles import middle
from optq.core.weight import LayerScheme, dequantize, group_index
from optq.errors import SettingError


@dataclass(frozen=True)
class Best:
    """Options of :class:`GPTQ` that leave the file format alone; and QEP."""

    actorder: ActOrder
    static_groups: bool
    mse: bool
    polish: int
    qep: bool


# The best known for each width, and the paper's. docs/defaults.md has the measurements.
BEST = {
    2: Best(actorder="group", static_groups=False, mse=True, polish=2, qep=True),
    3: Best(actorder="group", static_groups=False, mse=True, polish=2, qep=True),
    4: Best(actorder="group", static_groups=False, mse=True, polish=1, qep=True),
    8: Best(actorder="group", static_groups=False, mse=True, polish=0, qep=False),
}
PLAIN = Best(actorder=False, static_groups=False, mse=False, polish=0, qep=False)
OPTIONS = ("actorder", "static_groups", "mse", "polish")  # of those, GPTQ's own


@dataclass(frozen=True)
class GPTQ(Solver):
    """The options of GPTQ. Those left at None become the best known for ``wbits``: ``BEST``.

    ``wbits``: 2, 3, 4 or 8. ``groupsize``: columns that share a scale; -1: one scale to a row.
    ``sym``: zero point in the middle. ``actorder``: sweep the columns by falling ``diag H``;
    ``"group"``: without parting groups, see :mod:`optq.core.order`. ``percdamp``: damping as a
    fraction of the mean of ``diag H``. ``mse``: search the range of each grid instead of taking its
    extremes. ``static_groups``: fit all grids on the original weights before the sweep, so that
    act-order needs no ``g_idx`` in the file. ``blocksize``: columns swept one by one before their
    errors go on in a matrix product; speed only. ``polish``: rounds of descent on codes and scales
    after the sweep, see :mod:`optq.core.descent`.
    """

    wbits: int
    groupsize: int = -1
    sym: bool = True
    actorder: ActOrder = None  # type: ignore[assignment]
    percdamp: float = 0.01
    mse: bool = None  # type: ignore[assignment]
    static_groups: bool = None  # type: ignore[assignment]
    blocksize: int = 64
    polish: int = None  # type: ignore[assignment]

    @classmethod
    def plain(
        cls,
        wbits: int,
        groupsize: int = -1,
        sym: bool = True,
        actorder: ActOrder = False,
        **options: Any,
    ) -> GPTQ:
        """The paper's algorithm, and nothing but what is added to it here."""
        paper = {name: getattr(PLAIN, name) for name in OPTIONS}
        return cls(wbits, groupsize, sym, **(paper | {"actorder": actorder} | options))

    def __post_init__(self) -> None:
        known = is_int(self.wbits) and self.wbits in BEST  # the grid refuses others
        best = BEST[self.wbits] if known else PLAIN
        for name in OPTIONS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(best, name))
        super().__post_init__()
        if not isinstance(self.actorder, bool) and self.actorder != "group":
            raise SettingError(f"actorder is {self.actorder!r}", 'choose True, False or "group"')
        if not isinstance(self.static_groups, bool):
            raise SettingError(f"static_groups is {self.static_groups!r}", "choose True or False")
        for name, least in (("polish", 0), ("blocksize", 1)):
            value = getattr(self, name)
            if not is_int(value) or value < least:
                raise SettingError(f"{name} is {value!r}", f"choose a whole number from {least}")

    def scheme(self) -> LayerScheme:
        static = self.static_groups or self.groupsize == -1
        follows = self.actorder is True and not static
        return LayerScheme(self.wbits, self.groupsize, self.sym, follows)

    def problem(self, H: Float[Tensor, "cols cols"]) -> Problem:
        return Problem(H, self.percdamp, self.actorder, self.grid.width(len(H)))

    def _solve(
        self, problem: Problem, weight: Tensor, aim: Tensor | None, storage: Storage
    ) -> Solution:
        H, order, factored, grid = problem.H, problem.order, problem.factor, self.grid
        columns, importance = len(H), problem.importance
        group = group_index(columns, grid.width(columns), H.device)
        if order is not None:
            importance = importance[order]
            follows = self.actorder != "group" and not self.static_groups
            group = group if follows else group[order]
        W = working_copy(weight, order)
        rounded = round_groups(W, group, grid, storage, importance, quick_dtype(W))
        damped = damped_error(rounded.miss, factored, exact=False)

        if aim is not None:
            W = working_copy(aim, order)
        sweep = _Sweep(W, factored, grid, storage, rounded, group, importance, self.blocksize)
        if self.static_groups or grid.width(columns) == columns:
            sweep.use_grids(rounded.scale, rounded.zero)
        sweep.run(0, columns)
        places = problem.places
        codes = sweep.codes if places is None else sweep.codes[places]
        g_idx = group if places is None else group[places]
        # Of rounding's error, what is damped will do until it is known better, below.
        solution = self._solution(codes, sweep.scale, sweep.zero, g_idx, sweep.error(), damped)
        if self.polish:
            target = weight if aim is None else aim
            solution = polish(target, problem, solution, storage, self.polish, exact=aim is None)

        error = solution.error
        if aim is not None:
            error = undamped_error((weight - solution.weight).T.to(H.dtype).contiguous(), H)
        better, rtn_error = compare_with_rounding(error, damped, rounded.miss, factored)
        unsure = (~better).nonzero().flatten()
        grids = (rounded.codes, rounded.scale, rounded.zero)
        codes, scale, zero = (each[:, unsure].T for each in grids)
        miss = working_copy(weight[unsure], order)
        miss -= dequantize(codes, scale, zero, group, grid.decode).T
        rtn_error[unsure] = factored_error(miss, factored)  # in full precision
        return no_worse(solution, rounded, places, error, rtn_error)


class _Sweep:
    """The sweep over the columns of one ``W``; its tensors are ``[cols, rows]``.

    ``W`` is used up: column by column its weights become the errors ``e``.
    """

    def __init__(
        self,
        W: Tensor,
        factored: Factor,
        grid: Grid,
        storage: Storage,
        near: Rounded,
        group: Tensor,
        importance: Tensor,
        blocksize: int,
    ) -> None:
        self.W, self.W_hat, self.grid, self.storage = W, W.clone(), grid, storage
        self.factored, self.importance, self.blocksize = factored, importance, blocksize
        self.near = near  # the original weights' grids, where the search for another one starts
        self.codes = torch.empty_like(W, dtype=torch.uint8)
        self.scale = W.new_empty(int(group.max()) + 1, W.shape[1])
        self.zero = torch.zeros_like(self.scale)
        # Views of each group, made once: the column loop is short of time for indexing.
        self.scales = list(self.scale)
        self.snaps = [grid.snapping(zero) for zero in self.zero]
        self.group_of, self.group = group, group.tolist()
        self.dynamic = True
        self.steps = W.new_empty(blocksize, W.shape[1])
        self.residual = W.new_zeros(W.shape[1])  # sum_j U_jj^2 (w^_j - q_j)^2

    def use_grids(self, scale: Tensor, zero: Tensor) -> None:
        """Sweep on grids fitted beforehand."""
        self.dynamic = False
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        self.snaps = [self.grid.snapping(zero) for zero in self.zero]

    def run(self, start: int, stop: int) -> None:
        """Quantize the columns ``start .. stop``; ``W^`` holds all errors before ``start``."""
        count, width = stop - start, self.grid.width(len(self.group))
        if self.dynamic and start % width == 0 and stop == min(start + width, len(self.group)):
            self._fit_group(start, stop)
        if count <= (min(self.blocksize, width) if self.dynamic else self.blocksize):
            self._one_by_one(start, stop)
            return
        half = middle(start, stop, width if self.dynamic and count > width else self.blocksize)
        self.run(start, half)
        left, right = slice(start, half), slice(half, stop)
        self.W_hat[right].addmm_(self.factored.N[left, right].T, self.W[left])
        self.run(half, stop)

    def error(self) -> Float[Tensor, " rows"]:
        """The error of each row, ``H`` not damped."""
        norm = weighted_squares(self.factored.live[None], self.W)[0]
        return (self.residual - self.factored.damp * norm).clamp_(min=0)

    def _fit_group(self, start: int, stop: int) -> None:
        columns, N = slice(start, stop), self.factored.N
        sums = self.W_hat[columns] - self.W[columns]
        one = torch.eye(stop - start, dtype=N.dtype, device=N.device)
        inverse = torch.linalg.solve_triangular(
            N[columns, columns], one, upper=True, unitriangular=True
        )
        updated = torch.addmm(self.W[columns], inverse.T, sums)
        group = self.group[start]
        near = (self.near.scale[group], self.near.zero[group])
        scale, zero = self.grid.fit(updated, self.storage, self.importance[columns], near)
        self.scale[group], self.zero[group] = scale, zero
        self.snaps[group] = self.grid.snapping(self.zero[group])

    def _one_by_one(self, start: int, stop: int) -> None:
        columns = slice(start, stop)
        block, N = self.W_hat[columns], self.factored.N[columns, columns]
        steps = self.steps[: stop - start]
        rows = zip(self.group[columns], block, self.W[columns], steps, N, strict=True)
        for j, (group, w_hat, w, step, spread) in enumerate(rows, start=1):
            scale = self.scales[group]
            self.snaps[group](torch.div(w_hat, scale, out=step))
            w_hat.addcmul_(step, scale, value=-1)  # w^ - q
            w.addcmul_(step, scale, value=-1)  # e
            block[j:].addr_(spread[j:], w)
        self.codes[columns] = self.grid.code(steps, self.zero[self.group_of[columns]])
        self.residual += self.factored.squares[columns] @ block.square()
