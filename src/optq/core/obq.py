"""OBQ, Optimal Brain Quantization (Frantar & Alistarh, NeurIPS 2022): exact, greedy and slow.

Each row picks its own order: take the weight ``p`` with the least
``(quant(w_p) - w_p)^2 / [H^-1]_pp``, put it on the grid, move the others by
``dw = -(w_p - quant(w_p)) / [H^-1]_pp * H^-1[:, p]``, drop ``p`` from ``H^-1``, repeat. GPTQ is
this with one order for all rows. Time is O(rows * cols^3) and memory O(cols^2) for each row at
work, so it serves small models and as the reference that GPTQ is held against.

Grids are fitted on the original weights: an order of its own for each row leaves no moment at
which a group "starts".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from optq.core.error import factored_error
from optq.core.grid import Grid, Storage
from optq.core.problem import Problem
from optq.core.rounding import no_worse, round_groups, working_copy
from optq.core.solution import Solution
from optq.core.solver import Solver
from optq.core.weight import group_index

ENTRIES_AT_ONCE = 2**26  # of the rows' inverse Hessians: 256 MB in float32


@dataclass(frozen=True)
class OBQ(Solver):
    """The options of OBQ; they mean what they mean for :class:`optq.core.gptq.GPTQ`."""

    wbits: int
    groupsize: int = -1
    sym: bool = True
    percdamp: float = 0.01
    mse: bool = False

    def _solve(
        self, problem: Problem, weight: Tensor, aim: Tensor | None, storage: Storage
    ) -> Solution:
        factored, grid = problem.factor, self.grid
        inverse = torch.cholesky_inverse(factored.U.flip(0, 1)).flip(0, 1)
        W = working_copy(weight)
        group = group_index(len(W), grid.width(len(W)), W.device)
        rounded = round_groups(W, group, grid, storage, problem.importance)
        scale, zero = rounded.scale[group], rounded.zero[group]  # of each weight
        target = W if aim is None else working_copy(aim)
        at_once = max(1, ENTRIES_AT_ONCE // len(W) ** 2)
        parts = zip(*(x.T.split(at_once) for x in (target, scale, zero)), strict=True)
        codes = torch.cat([_greedy(inverse, grid, *part) for part in parts]).T
        error = factored_error(W - grid.decode(codes, scale, zero), factored)
        rtn_error = factored_error(rounded.miss, factored)
        solution = self._solution(codes, rounded.scale, rounded.zero, group, error, rtn_error)
        return no_worse(solution, rounded, None, error, rtn_error)


def eliminate(inverse: Float[Tensor, "rows cols cols"], p: Int[Tensor, " rows"]) -> None:
    """Drop weight ``p[r]`` from row ``r``'s inverse Hessian, in place.

    ``H^-1 <- H^-1 - H^-1[:, p] H^-1[p, :] / [H^-1]_pp``: what stays is the inverse of ``H``
    without row and column ``p``, whose own entries become zero.
    """
    rows = torch.arange(len(p), device=p.device)
    column = inverse[rows, :, p]
    pivot = inverse[rows, p, p]
    inverse.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None, :], alpha=-1)
    inverse[rows, p, :] = 0
    inverse[rows, :, p] = 0


def _greedy(
    inverse: Float[Tensor, "cols cols"],
    grid: Grid,
    W: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "rows cols"],
    zero: Float[Tensor, "rows cols"],
) -> UInt8[Tensor, "rows cols"]:
    """The code of every weight, each row in its own order."""
    W = W.clone(memory_format=torch.contiguous_format)
    rows, columns = W.shape
    each = torch.arange(rows, device=W.device)
    inverses = inverse.expand(rows, columns, columns).clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(W, dtype=torch.uint8)
    left = torch.ones_like(W, dtype=torch.bool)
    for _ in range(columns):
        closest, values = grid.nearest(W, scale, zero)
        pivots = inverses.diagonal(dim1=1, dim2=2)
        cost = (values - W).square_() / pivots
        p = cost.masked_fill_(~left, torch.inf).argmin(1)
        codes[each, p] = closest[each, p]
        left[each, p] = False
        miss = W[each, p] - values[each, p]
        W -= (miss / pivots[each, p])[:, None] * inverses[each, :, p]
        eliminate(inverses, p)
    return codes
