"""Round-to-nearest: every weight to the nearest value of its grid. The baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optq.core.error import undamped_error
from optq.core.grid import Storage
from optq.core.problem import Problem
from optq.core.rounding import no_worse, round_groups, working_copy
from optq.core.solution import Solution
from optq.core.solver import Solver
from optq.core.weight import group_index


@dataclass(frozen=True)
class RTN(Solver):
    """Round to nearest; options as in :class:`optq.core.grid.IntegerGrid`.

    ``H`` measures the error, and its diagonal weighs the columns where a range is searched.
    """

    wbits: int
    groupsize: int = -1
    sym: bool = True
    mse: bool = False
    percdamp = 0.0  # no option: nothing is damped

    def _solve(
        self, problem: Problem, weight: Tensor, aim: Tensor | None, storage: Storage
    ) -> Solution:
        W = working_copy(weight)
        group = group_index(len(W), self.grid.width(len(W)), W.device)
        rounded = round_groups(W, group, self.grid, storage, problem.importance)
        rtn_error = undamped_error(rounded.miss, problem.H)
        grids = rounded.scale, rounded.zero
        if aim is None:
            return self._solution(rounded.codes, *grids, group, rtn_error, rtn_error)
        codes, values = self.grid.nearest(working_copy(aim), *(each[group] for each in grids))
        error = undamped_error(W.sub_(values), problem.H)
        solution = self._solution(codes, *grids, group, error, rtn_error)
        return no_worse(solution, rounded, None, error, rtn_error)
