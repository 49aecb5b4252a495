"""Polish: descend on codes and scales of a quantized weight, from where a solver left them.

The sweep of GPTQ never looks back. Here every code and every scale is a coordinate of
``error = (W - Q) H (W - Q)^T``, and each takes, in turn, its best value with all others held:

* codes: with ``G = H (w - q)`` the code ``j`` of a row that moves by ``n`` steps of ``s`` lowers
  the error by ``2 n s G_j - (n s)^2 H_jj``. The best ``n`` is the integer nearest to
  ``G_j / (s H_jj)``, kept inside the range of the codes.
* scales: with ``t = c - z`` over a group, its scale moves by ``t G / (t H t + ridge)``, least
  squares under ``H``; it is rounded to what a file keeps, and stays where it was unless that lowers
  the error.

A round visits the groups in order. ``G`` is kept lazily: a visit updates it inside its block, and
halves of a range exchange their changes in matrix products, as in :mod:`optq.core.gptq`. A
round costs ``rows * cols^2`` multiply-adds, the ``G`` at the start as much, and all of it runs in
bfloat16 where that is fast: a gradient that is off by 2^-9 picks nearly the same steps. What holds
the promise is the end: the error is computed anew, in full precision, and rows that did not gain
keep what they had.

Of ``STEP_COLUMNS`` neighbouring columns only the one that gains most moves at a time. Rounds that
do so fall as fast as rounds that move one column after another, in fewer and larger operations.

What it gains, costs, and what was rejected on the way: docs/log.md.

Everything is held transposed, ``[cols, rows]``: a column is one contiguous vector over rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.compiled import MAGIC, by_rows, numbers, serves, transposed
from optq.core.error import undamped_error
from optq.core.grid import Grid, Storage
from optq.core.precision import exact_products, quick_dtype
from optq.core.problem import Problem
from optq.core.solution import Solution
from optq.core.tiles import middle
from optq.core.weight import QuantizedWeight

STEP_COLUMNS = 16  # of them the best one moves
BLOCK = 128  # columns that are visited together; a narrower group is its own block
PASSES = 2  # over a block in one visit: they cost little beside the products between blocks
RIDGE = 1e-3  # of the mean diagonal: keeps a scale still along inputs that were never seen
ROWS_AT_ONCE = 2048  # on a CPU: fewer are slower, more hold more memory


@exact_products()
def polish(
    target: Float[Tensor, "rows cols"],
    problem: Problem,
    solution: Solution,
    storage: Storage = Storage(),
    rounds: int = 1,
    exact: bool = True,
) -> Solution:
    """Lower ``(target - Q) H (target - Q)^T`` row by row, from ``solution``, whose ``error`` is of
    ``target``; none ever rises.

    Zero points and ``g_idx`` stay. Unless ``exact``, the error afterwards may be taken in
    bfloat16, and a row rise by what that is off: for a caller who measures the result himself.
    """
    start, H, dead = time.perf_counter(), problem.H, problem.dead
    ordered, order = solution.sorted()
    if order is not None:
        target, H, dead = target[:, order], H[order][:, order], dead[order]
    at_once = solution.rows if H.device.type == "cuda" else ROWS_AT_ONCE
    rows_at_work = min(at_once, solution.rows)
    descent = _Descent(H, dead, ordered, solution.grid, storage, rows_at_work, exact)
    codes, scales = ordered.codes.clone(), ordered.scales.clone()
    after = []
    for first in range(0, solution.rows, at_once):
        rows = slice(first, min(first + at_once, solution.rows))
        tensors = (target[rows], codes[rows], scales[rows], solution.zeros[rows])
        after.append(descent.solve(*tensors, rounds, solution.error[rows]))
    if order is not None:
        codes = codes[:, torch.argsort(order)]
    seconds = problem.seconds
    seconds["polish"] = seconds.get("polish", 0.0) + elapsed(start, H)
    return replace(solution, codes=codes, scales=scales, error=torch.cat(after))


class _Descent:
    """The rounds over some rows at a time; its tensors are ``[cols, rows]``, and used again.

    Groups are consecutive columns. ``steps`` are units of the grid, ``gradient`` is ``H (w - q)``.
    """

    def __init__(
        self,
        H: Tensor,
        dead: Tensor,
        weight: QuantizedWeight,
        grid: Grid,
        storage: Storage,
        rows: int,
        exact: bool,
    ) -> None:
        self.H, self.dead, self.storage, self.exact = H, dead.nonzero().flatten(), storage, exact
        self.grid, self.columns, self.width = grid, weight.cols, weight.width
        self.narrow = self.width <= BLOCK
        self.group = weight.g_idx.long()
        self.H_quick = H.to(quick_dtype(H))
        diagonal = H.diagonal()[:, None]
        self.twice_inverse = torch.where(diagonal > 0, 2 / diagonal, 0)  # a dead column stays
        # Duplicated columns gain the same: the first of them moves, not all at once.
        place = torch.arange(self.columns, device=H.device)[:, None] % STEP_COLUMNS
        self.worth = diagonal * (1 - 2**-18 * place)
        size = self.columns * rows
        self.memory = [H.new_empty(size), H.new_empty(size), self.H_quick.new_empty(size)]
        self.memory += [H.new_empty(min(BLOCK, self.columns) * rows)]

    def solve(
        self,
        target: Float[Tensor, "rows cols"],
        codes: UInt8[Tensor, "rows cols"],
        scales: Float[Tensor, "rows groups"],
        zeros: UInt8[Tensor, "rows groups"],
        rounds: int,
        before: Float[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """Lower the error of these rows in place; it was ``before``, and is what is returned."""
        rows = len(codes)
        views = [part[: len(part) // rows * rows].view(-1, rows) for part in self.memory]
        self.steps, self.gradient, self.changes, self.delta = (
            view[: self.columns] for view in views
        )
        # A copy, also of one group or one row, whose transpose is as contiguous as it is.
        self.scale = scales.T.clone(memory_format=torch.contiguous_format)
        self.zero = zeros.T.to(scales.dtype)
        self.snaps = [self.grid.snapping(zero) for zero in self.zero]
        parts = zip(self._parts(), transposed(codes).split(self.width), strict=True)
        for (part, zero), code in parts:
            self.steps[part] = self.grid.units(code, zero)

        self.changes.copy_(self._miss(target))
        self.gradient.copy_(self.H_quick @ self.changes)
        for left in reversed(range(rounds)):
            self._run(0, self.columns, last=left == 0)
        after = undamped_error(self._miss(target), self.H if self.exact else self.H_quick)
        group = self.group[self.dead]  # of columns of which nothing is known: they are rounded
        zero = self.zero[group]
        code, _ = self.grid.nearest(target.T[self.dead], self.scale[group], zero)
        self.steps[self.dead] = self.grid.units(code, zero)

        better = after < before
        found = [self.grid.code(self.steps[part], zero) for part, zero in self._parts()]
        codes.copy_(torch.where(better[:, None], transposed(torch.cat(found)), codes))
        scales.copy_(torch.where(better[:, None], self.scale.T, scales))
        return torch.where(better, after, before)

    def _miss(self, target: Tensor) -> Tensor:
        """``w - q``, in the memory of the gradient."""
        self.gradient.copy_(transposed(target))
        for (part, _), scale in zip(self._parts(), self.scale, strict=True):
            self.gradient[part].addcmul_(self.steps[part], scale, value=-1)
        return self.gradient

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The columns of each group, and its zero points."""
        for group, zero in enumerate(self.zero):
            yield slice(group * self.width, (group + 1) * self.width), zero

    def _run(self, start: int, stop: int, last: bool) -> None:
        """Visit the columns ``start .. stop``, whose gradient is complete, and is again after.

        In the ``last`` round, what was visited needs its gradient no more.
        """
        count, width = stop - start, self.width
        if not self.narrow and start % width == 0 and stop == min(start + width, self.columns):
            self._move_scale(slice(start, stop), slice(None))
        if count <= min(width, BLOCK):
            self._visit(slice(start, stop))
            return
        half = middle(start, stop, width if count > width else BLOCK)
        left, right = slice(start, half), slice(half, stop)
        self._run(start, half, last)
        self._spread(left, right)
        self._run(half, stop, last)
        if not last:
            self._spread(right, left)

    def _spread(self, source: slice, to: slice) -> None:
        H, changes = self.H_quick[to, source], self.changes[source]
        if H.dtype == self.gradient.dtype:
            self.gradient[to].addmm_(H, changes)
        else:
            self.gradient[to] += H @ changes

    def _visit(self, block: slice) -> None:
        """Move scale and codes of a block, ``PASSES`` times; the change of ``w - q`` is kept."""
        group, gradient = block.start // self.width, self.gradient[block]
        delta = self.delta[: block.stop - block.start].zero_()
        inside = self.H[block, block].contiguous()
        snap = self.snaps[group]
        tensors = (gradient, self.steps[block], self.twice_inverse[block], self.worth[block], delta)
        parts = [*(each.split(STEP_COLUMNS) for each in tensors), inside.split(STEP_COLUMNS, dim=1)]
        for _ in range(PASSES):
            if self.narrow:
                change = self._move_scale(block, block)
                delta.addcmul_(self.steps[block], change, value=-1)
            scale = self.scale[group]
            if self.grid.levels is not None and serves(gradient):
                levels, magic = numbers(gradient, self.grid.levels, MAGIC[gradient.dtype])
                by_rows(
                    *("descend", 0, len(scale), gradient, self.steps[block], delta, scale),
                    *(self.zero[group], self.twice_inverse[block, 0], self.worth[block, 0], inside),
                    *(STEP_COLUMNS, levels, magic),
                )
                continue
            inverse = 1 / scale
            for own, codes, twice_inverse, worth, moved, spread in zip(*parts, strict=True):
                # The change of each code, and (2 G - H_jj n s) n s / s^2, what it gains.
                wish = (own * twice_inverse).mul_(inverse)
                steps = snap(torch.add(codes, wish, alpha=0.5)).sub_(codes)
                gain = wish.sub_(steps).mul_(steps).mul_(worth)
                best = gain.amax(0).clamp_(min=torch.finfo(gain.dtype).tiny)
                steps.mul_(gain.sub_(best).sign_().add_(1))  # all but the best stay
                codes.add_(steps)
                steps.mul_(scale)
                moved.sub_(steps)
                gradient.addmm_(spread, steps, alpha=-1)
        self.changes[block] = delta

    def _move_scale(self, group: slice, reach: slice) -> Float[Tensor, " rows"]:
        """Least squares for the scale of one group; the gradient is updated in ``reach``."""
        steps, index = self.steps[group], group.start // self.width
        product = (self.H_quick[reach, group] @ steps.to(self.H_quick.dtype)).to(steps.dtype)
        own = product if reach == group else product[group]
        slope = (self.gradient[group] * steps).sum(0)
        ridge = RIDGE * self.H.diagonal()[group].mean()
        curve = (own * steps).sum(0).add_(steps.square().sum(0), alpha=ridge.item())
        scale = self.scale[index]
        moved = self.storage.round(scale + slope / curve).to(scale.dtype)
        change = moved - scale
        # Below: not where the scale would change sign, nor where rounding it ate the gain.
        good = (change * (2 * slope - change * curve) > 0) & (moved * scale > 0)
        change = torch.where(good, change, 0)
        self.scale[index] = torch.where(good, moved, scale)
        self.gradient[reach].addcmul_(product, change, value=-1)
        return change
