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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from optq.core.compiled import transposed
from optq.core.descent import polish
from optq.core.error import compare_with_rounding, damped_error, factored_error, undamped_error
from optq.core.grid import Storage, is_int
from optq.core.order import ActOrder
from optq.core.precision import quick_dtype
from optq.core.problem import Problem
from optq.core.rounding import Rounded, no_worse, round_groups, working_copy
from optq.core.solution import Solution
from optq.core.solver import Solver
from optq.core.sweep import Start, Sweep
from optq.core.weight import LayerScheme, dequantize, group_index
from optq.errors import SettingError

UNIT = 64  # rows: optq.ranks has as many stay together


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
        return self._solve_together([problem], [weight], [aim], storage)[0]

    def _solve_together(
        self,
        problems: Sequence[Problem],
        weights: Sequence[Tensor],
        aims: Sequence[Tensor | None],
        storage: Storage,
    ) -> list[Solution]:
        columns = weights[0].shape[1]
        width = self.grid.width(columns)
        dynamic = not (self.static_groups or width == columns)
        parted = not dynamic and self.actorder is True and width < columns  # each in its own way
        if len(problems) > 1 and parted:
            return super()._solve_together(problems, weights, aims, storage)
        each = list(zip(problems, weights, aims, strict=True))
        known = [self._prepare(problem, weight, storage, dynamic) for problem, weight, _ in each]
        starts = [
            ready.start(working_copy(weight if aim is None else aim, problem.order), problem)
            for ready, (problem, weight, aim) in zip(known, each, strict=True)
        ]
        group = known[0].group if parted else group_index(columns, width, weights[0].device)
        sweep = Sweep(starts, group, self.grid, storage, self.blocksize, dynamic)
        return [
            self._finish(sweep, index, ready, *each[index], storage)
            for index, ready in enumerate(known)
        ]

    def _prepare(
        self, problem: Problem, weight: Tensor, storage: Storage, dynamic: bool
    ) -> _Prepared:
        """What does not depend on the sweep: the rounded weight, which is what to beat."""
        order, factored, grid = problem.order, problem.factor, self.grid
        columns, importance = len(problem.H), problem.importance
        width = grid.width(columns)
        group = group_index(columns, width, problem.H.device)
        labels = None
        if order is not None:
            importance = importance[order]
            if self.actorder == "group" or not dynamic:
                group = group[order]
            if self.actorder == "group":
                labels = group[::width].long()
        W = working_copy(weight, order)
        rounded = round_groups(W, group, grid, storage, importance, quick_dtype(W))
        damped = damped_error(rounded.miss, factored, exact=False)
        return _Prepared(rounded, damped, group, labels, importance)

    def _finish(
        self,
        sweep: Sweep,
        index: int,
        ready: _Prepared,
        problem: Problem,
        weight: Tensor,
        aim: Tensor | None,
        storage: Storage,
    ) -> Solution:
        H, factored, places, rounded = problem.H, problem.factor, problem.places, ready.rounded
        codes, group = sweep.codes[:, sweep.own[index]], ready.group
        if places is not None:
            codes, group = codes[places], group[places]
        scale, zero = (ready.as_labelled(x[:, sweep.own[index]]) for x in (sweep.scale, sweep.zero))
        # Of rounding's error, what is damped will do until it is known better, below.
        solution = self._solution(codes, scale, zero, group, sweep.error(index), ready.damped)
        if self.polish:
            target = weight if aim is None else aim
            solution = polish(target, problem, solution, storage, self.polish, exact=aim is None)

        error = solution.error
        if aim is not None:
            error = undamped_error(transposed(weight - solution.weight).to(H.dtype), H)
        better, rtn_error = compare_with_rounding(error, ready.damped, rounded.miss, factored)
        unsure = (~better).nonzero().flatten()
        codes, scale, zero = (
            each[:, unsure].T for each in (rounded.codes, rounded.scale, rounded.zero)
        )
        miss = working_copy(weight[unsure], problem.order)
        miss -= dequantize(codes, scale, zero, ready.group, self.grid.decode).T
        # In full precision; of whole units of rows, for MKL sums fewer in another order.
        miss = pad(miss, (0, -len(unsure) % UNIT))
        rtn_error[unsure] = factored_error(miss, factored)[: len(unsure)]
        return no_worse(solution, rounded, places, error, rtn_error)


@dataclass(frozen=True)
class _Prepared:
    """A weight before its sweep; ``group`` is that of each column, in the order of the sweep.

    ``labels`` are the groups in that order; None: as they are.
    """

    rounded: Rounded
    damped: Float[Tensor, " rows"]  # the error of ``rounded``
    group: Int[Tensor, " cols"]
    labels: Int[Tensor, " groups"] | None
    importance: Float[Tensor, "cols 1"]

    def start(self, W: Float[Tensor, "cols rows"], problem: Problem) -> Start:
        near = self.rounded.scale, self.rounded.zero
        if self.labels is not None:
            near = near[0][self.labels], near[1][self.labels]
        return Start(W, problem.factor, self.importance, near)

    def as_labelled(self, swept: Float[Tensor, "groups rows"]) -> Float[Tensor, "groups rows"]:
        """What was found for each group in the order of the sweep, in that of the columns."""
        return swept if self.labels is None else swept[torch.argsort(self.labels)]
