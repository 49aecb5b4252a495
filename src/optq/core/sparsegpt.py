"""SparseGPT (Frantar & Alistarh, ICML 2023): OBS with one order for all rows, in GPTQ's sweep.

Removing weight ``p`` when all columns before it are done costs ``w_p^2 / (2 [H^-1]_pp)``, with the
inverse of what is left of ``H`` (:mod:`optq.core.obs`). With ``H = U U^T``, ``U`` upper triangular,
that is ``(w_p U_pp)^2 / 2``: the factor that :mod:`optq.core.gptq` sweeps with says what each
weight is worth. So the sweep is GPTQ's with another rule: a weight becomes 0 or stays, and what
it misses goes on to the columns behind it. With ``wbits`` what stays is rounded in the same sweep.

1. Which weights stay is chosen for a block of columns at a time, when the sweep reaches its first,
   on the weights as updated so far. Those are not what the form without the inverse holds there
   (departure 2 of :mod:`optq.core.gptq`): they are solved for, as where a grid is fitted.
2. Of a share, 64 rows compete with each other for what stays of a block, where the authors' code
   compares all rows of a layer: rows are solved in parts, here and by several processes, and parts
   of 64 gain most of what all of them gain over each row by itself (docs/log.md).
3. A pattern n:m is chosen for ``m`` columns at a time. Where weights are rounded as well and the
   group is wider, its grid is fitted to what the pattern would keep as the group is reached.
4. After the sweep, ``refit`` steps move what stays towards the least squares that the choice
   allows (:mod:`optq.core.refit`): the sweep never looks back. Weights are then rounded in a
   second sweep, which aims at that, and where the choice is made. ``refit=0`` is the paper's: one
   sweep, that removes and rounds.
5. No row ends worse than by magnitude with as many zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optq.core.compiled import MAGIC, by_rows, numbers, serves
from optq.core.grid import Grid, Storage, is_int
from optq.core.problem import Problem
from optq.core.pruning import UNSEEN, Pattern, Pruner, Uncoded
from optq.core.refit import refit
from optq.core.rounding import Rounded, round_groups, working_copy
from optq.core.solution import Solution
from optq.core.sweep import Start, Sweep
from optq.core.weight import dequantize, group_index
from optq.errors import SettingError

UNIT = 64  # rows that compete: optq.ranks has as many stay together


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Options as in :class:`optq.core.pruning.Pruner`.

    ``refit``: steps of least squares on what is left. ``mse`` is on where weights are quantized,
    unless it is given. ``blocksize``: as of :class:`optq.core.gptq.GPTQ`; speed only.
    """

    sparsity: float | str = 0.5
    wbits: int | None = None
    groupsize: int = -1
    sym: bool = True
    percdamp: float = 0.01
    mse: bool = None  # type: ignore[assignment]
    refit: int = 8
    blocksize: int = 64

    @classmethod
    def plain(
        cls, sparsity: float | str = 0.5, wbits: int | None = None, **options: Any
    ) -> SparseGPT:
        """The paper's algorithm, and nothing but what is added to it here."""
        return cls(sparsity, wbits, **({"mse": False, "refit": 0} | options))

    def __post_init__(self) -> None:
        if vars(self)["mse"] is None:
            object.__setattr__(self, "mse", self.wbits is not None)
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
        targets = [
            working_copy(weight if aim is None else aim)
            for weight, aim in zip(weights, aims, strict=True)
        ]
        originals = [working_copy(weight) for weight in weights]
        each = list(zip(problems, originals, strict=True))
        if self.wbits is None or self.refit:
            start = [target.clone() for target in targets]
            sweep = self._sweep(Uncoded(), problems, start, self.pattern, storage)
            keeps = [sweep.keep[:, own].clone() for own in sweep.own]
            targets = [
                self._refitted(target, (target - sweep.W[:, own]).mul_(keep), keep, problem)
                for target, own, keep, problem in zip(
                    targets, sweep.own, keeps, problems, strict=True
                )
            ]
            del sweep
            if self.wbits is None:
                baselines = [
                    self.magnitude(W, problem, storage, keep)
                    for (problem, W), keep in zip(each, keeps, strict=True)
                ]
                return [
                    self.pruned(W, values, problem, baseline, storage)
                    for (problem, W), values, baseline in zip(each, targets, baselines, strict=True)
                ]
            sweep = self._sweep(self.grid, problems, targets, keeps, storage)
        else:
            sweep = self._sweep(self.grid, problems, targets, self.pattern, storage)
        return [self._coded(sweep, i, *pair, storage) for i, pair in enumerate(each)]

    def _refitted(self, target: Tensor, values: Tensor, keep: Tensor, problem: Problem) -> Tensor:
        return refit(target, values, keep, problem, self.refit) if self.refit else values

    def _sweep(
        self,
        grid: Grid,
        problems: Sequence[Problem],
        targets: Sequence[Float[Tensor, "cols rows"]],
        kept: Pattern | Sequence[Bool[Tensor, "cols rows"]],
        storage: Storage,
    ) -> PruningSweep:
        """Over ``targets``, which are used up; ``kept``: what stays, or how it is chosen.

        Grids that are not fitted in mid-sweep are those of what stays by magnitude.
        """
        starts, columns = [], len(targets[0])
        group = group_index(columns, grid.width(columns), targets[0].device)
        for index, (problem, target) in enumerate(zip(problems, targets, strict=True)):
            keep = kept.keep(target.abs()) if isinstance(kept, Pattern) else kept[index]
            importance = problem.importance
            fitted = round_groups(target * keep, group, grid, storage, importance)
            near = fitted.scale, fitted.zero
            starts.append(Start(target, problem.factor, importance, near))
        dynamic = grid.width(columns) < columns
        return PruningSweep(starts, group, grid, storage, self.blocksize, dynamic, kept)

    def _coded(
        self, sweep: PruningSweep, index: int, problem: Problem, W: Tensor, storage: Storage
    ) -> Solution:
        own, group = sweep.own[index], sweep.group_of
        codes, scale, zero = (x[:, own] for x in (sweep.codes, sweep.scale, sweep.zero))
        values = dequantize(codes.T, scale.T, zero.T, group, self.grid.decode).T
        baseline = self.magnitude(W, problem, storage, sweep.keep[:, own])
        found = Rounded(codes, scale, zero, W - values)
        return self.coded(W, found, group, problem, baseline)


class PruningSweep(Sweep):
    """The sweep over some ``W`` which ``keep`` a part of their weights.

    ``kept``: what that is, where it is known; or the pattern by which it is chosen on the way.
    """

    keep: Tensor

    def __init__(
        self,
        starts: Sequence[Start],
        group: Int[Tensor, " cols"],
        grid: Grid,
        storage: Storage,
        blocksize: int,
        dynamic: bool,
        kept: Pattern | Sequence[Bool[Tensor, "cols rows"]],
    ) -> None:
        self.pattern = kept if isinstance(kept, Pattern) else None
        if isinstance(kept, Pattern):
            columns, rows = starts[0].W.shape
            self.keep = starts[0].W.new_empty(columns, len(starts) * rows, dtype=torch.bool)
        else:
            self.keep = torch.cat([*kept], dim=1)
        super().__init__(starts, group, grid, storage, blocksize, dynamic)

    def _prepare(self) -> None:
        """Blocks of a share are groups where there are some: boundaries of both would not nest."""
        self.on_gpu = False  # whose kernel knows no mask
        if self.pattern is not None:
            self.block = self.width if self.dynamic and not self.pattern.of else self.pattern.block
            self.units = sorted({*self.units, self.block}, reverse=True)

    def _begin(self, unit: int, start: int, stop: int) -> None:
        columns, kept = slice(start, stop), []
        for index, (each, own) in enumerate(zip(self.starts, self.own, strict=True)):
            updated, keep = self._updated(columns, index), self.keep[columns, own]
            if self.pattern is not None:
                squares = each.factored.squares
                seen = squares.where(squares > 0, UNSEEN * squares.mean())
                worth = seen[columns, None] * updated.square()
                chosen = self.pattern.keep(worth, start, UNIT)
                keep = keep.copy_(chosen) if unit == self.block else chosen
            kept.append(updated.mul_(keep))
        if self.dynamic and unit == self.width:
            self._fit_group(columns, kept)

    def _one_by_one(self, start: int, stop: int) -> None:
        if not serves(self.W):
            super()._one_by_one(start, stop)
            return
        columns, grids = slice(start, stop), (self.scale, self.zero, self.group_of)
        for each, own in zip(self.starts, self.own, strict=True):
            inside, squares = each.factored.N[columns, columns], each.factored.squares[columns]
            given = self.W_hat, self.W, self.codes, self.residual, self.keep, inside, squares
            if self.levels is None:
                rows = own.start, own.stop
                by_rows("prune", *rows, *given, start, stop)
                continue
            limits = numbers(self.W, self.levels, MAGIC[self.W.dtype])
            given = *given, *grids, start, stop, *limits
            by_rows("round_kept", own.start, own.stop, *given)
