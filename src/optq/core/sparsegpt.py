"""SparseGPT (Frantar & Alistarh, ICML 2023): OBS with one order for all rows, in GPTQ's sweep.

Removing weight ``p`` when all columns before it are done costs ``w_p^2 / (2 [H^-1]_pp)``, with the
inverse of what is left of ``H`` (:mod:`optq.core.obs`). With ``H = U U^T``, ``U`` upper triangular,
that is ``(w_p U_pp)^2 / 2``: the factor that :mod:`optq.core.gptq` sweeps with says what each
weight is worth. So the sweep is GPTQ's with another rule: a weight becomes 0 or stays, and what
it misses goes on to the columns behind it. With ``wbits`` what stays is rounded in the same sweep.

1. Which weights stay is chosen for a block of columns at a time, when the sweep reaches its first,
   on the weights as updated so far. Those are not what the form without the inverse holds there
   (departure 2 of :mod:`optq.core.gptq`): they are solved for, as where a grid is fitted.
2. Of each row by itself the same share of each block is removed, where the authors' code compares
   the weights of all rows of a layer: rows can then be solved apart, and it does no worse here.
3. A pattern n:m is chosen for ``m`` columns at a time. Where weights are rounded as well and the
   group is wider, its grid is fitted to what the pattern would keep as the group is reached.
4. After the sweep, ``refit`` steps move what stays towards the least squares that the choice
   allows (:mod:`optq.core.refit`): the sweep never looks back.
5. No row ends worse than by magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from optq.core.compiled import MAGIC, by_rows, numbers, pruning_loops, serves
from optq.core.grid import Grid, Storage, is_int
from optq.core.problem import Problem
from optq.core.pruning import Baseline, Pattern, Pruner
from optq.core.refit import refit
from optq.core.rounding import Rounded, working_copy
from optq.core.solution import Solution
from optq.core.sweep import Start, Sweep
from optq.core.weight import dequantize, group_index
from optq.errors import SettingError


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Options as in :class:`optq.core.pruning.Pruner`.

    ``refit``: steps of least squares on what is left; of weights that are not quantized.
    """

    sparsity: float | str = 0.5
    wbits: int | None = None  # type: ignore[assignment]
    groupsize: int = -1
    sym: bool = True
    percdamp: float = 0.01
    mse: bool = False
    refit: int = 0
    blocksize: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("refit", 0), ("blocksize", 1)):
            value = getattr(self, name)
            if not is_int(value) or value < least:
                raise SettingError(f"{name} is {value!r}", f"choose a whole number from {least}")

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
        dynamic, group = width < columns, group_index(columns, width, weights[0].device)
        each = list(zip(problems, weights, aims, strict=True))
        known = [self.magnitude(working_copy(weight), p, storage) for p, weight, _ in each]
        starts = [
            Start(
                working_copy(weight if aim is None else aim),
                problem.factor,
                problem.importance,
                (baseline.rounded.scale, baseline.rounded.zero),
            )
            for baseline, (problem, weight, aim) in zip(known, each, strict=True)
        ]
        how = self.grid, storage, self.blocksize, dynamic
        sweep = PruningSweep(starts, group, *how, self.pattern)
        return [
            self._finish(sweep, index, baseline, *each[index], storage)
            for index, baseline in enumerate(known)
        ]

    def _finish(
        self,
        sweep: PruningSweep,
        index: int,
        baseline: Baseline,
        problem: Problem,
        weight: Tensor,
        aim: Tensor | None,
        storage: Storage,
    ) -> Solution:
        W, own = working_copy(weight), sweep.own[index]
        if self.wbits is None:
            target = W if aim is None else working_copy(aim)
            keep = sweep.keep[:, own]
            values = (target - sweep.W[:, own]).mul_(keep)
            if self.refit:
                values = refit(target, values, keep, problem, self.refit)
            return self.pruned(W, values, problem, baseline, storage)
        codes, scale, zero = (x[:, own] for x in (sweep.codes, sweep.scale, sweep.zero))
        group = sweep.group_of
        values = dequantize(codes.T, scale.T, zero.T, group, self.grid.decode).T
        found = Rounded(codes, scale, zero, W - values)
        return self.coded(W, found, group, problem, baseline)


class PruningSweep(Sweep):
    """The sweep over some ``W``, which ``keep`` a part of their weights, by ``pattern``."""

    keep: Tensor

    def __init__(
        self,
        starts: Sequence[Start],
        group: Int[Tensor, " cols"],
        grid: Grid,
        storage: Storage,
        blocksize: int,
        dynamic: bool,
        pattern: Pattern,
    ) -> None:
        self.pattern = pattern
        columns, rows = starts[0].W.shape
        self.keep = torch.empty(
            columns, len(starts) * rows, dtype=torch.bool, device=starts[0].W.device
        )
        super().__init__(starts, group, grid, storage, blocksize, dynamic)

    def _prepare(self) -> None:
        """Blocks of a share are groups where there are some: boundaries of both would not nest."""
        self.block = self.width if self.dynamic and not self.pattern.of else self.pattern.block
        self.units = sorted({*self.units, self.block}, reverse=True)
        self.on_gpu = False  # whose kernel knows no mask

    def _begin(self, unit: int, start: int, stop: int) -> None:
        columns, kept = slice(start, stop), []
        for index, (each, own) in enumerate(zip(self.starts, self.own, strict=True)):
            updated, factored = self._updated(columns, index), each.factored
            worth = factored.squares[columns, None] * updated.square()
            keep = self.pattern.keep(worth, start)
            if unit == self.block:
                self.keep[columns, own] = keep
            kept.append(updated.mul_(keep))
        if self.dynamic and unit == self.width:
            self._fit_group(columns, kept)

    def _one_by_one(self, start: int, stop: int) -> None:
        loops = pruning_loops() if serves(self.W) else None
        if loops is None:
            super()._one_by_one(start, stop)
            return
        columns, grids = slice(start, stop), (self.scale, self.zero, self.group_of)
        for each, own in zip(self.starts, self.own, strict=True):
            inside, squares = each.factored.N[columns, columns], each.factored.squares[columns]
            given = self.W_hat, self.W, self.codes, self.residual, self.keep, inside, squares
            if self.levels is None:
                by_rows(loops.prune, own.start, own.stop, *given, start, stop)
                continue
            limits = numbers(self.W, self.levels, MAGIC[self.W.dtype])
            by_rows(loops.round_kept, own.start, own.stop, *given, *grids, start, stop, *limits)
