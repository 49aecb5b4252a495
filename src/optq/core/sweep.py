"""The sweep of GPTQ over the columns: see :mod:`optq.core.gptq` for what it computes.

Weights of one shape, each with a Hessian of its own (the experts of a block), are swept side by
side: products with a factor are made for each, and the column loop, which on a CPU waits for the
next operation longer than for its result, runs once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optq.core.compiled import MAGIC, by_rows, numbers, serves
from optq.core.error import weighted_squares
from optq.core.gpu import triton_serves
from optq.core.grid import Grid, Storage
from optq.core.problem import Factor
from optq.core.tiles import middle


@dataclass(frozen=True)
class Start:
    """One weight before its sweep, columns and groups in the order of the sweep.

    ``near`` are the grids of the original weight, where the search for others starts.
    """

    W: Float[Tensor, "cols rows"]
    factored: Factor
    importance: Float[Tensor, "cols 1"]
    near: tuple[Float[Tensor, "groups rows"], Float[Tensor, "groups rows"]]


class Sweep:
    """The sweep over some ``W`` of one shape; ``group`` is that of each column, in all of them.

    Its tensors are ``[cols, weights * rows]``. ``W`` is used up: column by column its weights
    become the errors ``e``. Unless ``dynamic`` the grids ``near`` are those of the sweep; else
    groups are consecutive columns, and each is fitted a grid when the sweep reaches it.
    """

    keep: Tensor | None = None  # where a weight may be other than 0; None: everywhere

    def __init__(
        self,
        starts: Sequence[Start],
        group: Int[Tensor, " cols"],
        grid: Grid,
        storage: Storage,
        blocksize: int,
        dynamic: bool,
    ) -> None:
        self.starts, self.grid, self.storage, self.blocksize = starts, grid, storage, blocksize
        (columns, rows), self.dynamic = starts[0].W.shape, dynamic
        self.width = grid.width(columns)
        # Columns where something is chosen when the sweep reaches the first of them, widest first.
        self.units = [self.width] if dynamic else []
        self.own = [slice(i * rows, (i + 1) * rows) for i in range(len(starts))]
        self.W = _beside([start.W for start in starts])
        self.W_hat = self.W.clone()
        self.levels = grid.levels
        self.on_gpu = _on_gpu(self.W)
        if self.on_gpu:
            self.blocksize = min(blocksize, 64)  # columns that stay in registers
        self.codes = torch.empty_like(self.W, dtype=torch.uint8)
        if dynamic:
            self.scale = self.W.new_empty(int(group.max()) + 1, self.W.shape[1])
            self.zero = torch.zeros_like(self.scale)
        else:
            self.scale, self.zero = (_beside([s.near[i] for s in starts]) for i in range(2))
        # Views of each group, made once: the column loop is short of time for indexing.
        self.scales = list(self.scale)
        self.snaps = [grid.snapping(zero) for zero in self.zero]
        self.group_of, self.group = group, group.tolist()
        self.steps = self.W.new_empty(blocksize, self.W.shape[1])
        self.residual = self.W.new_zeros(self.W.shape[1])  # sum_j U_jj^2 (w^_j - q_j)^2
        self._prepare()
        self._run(0, len(self.W))

    def _prepare(self) -> None:
        """What a sweep of another kind needs before it begins."""

    def error(self, index: int) -> Float[Tensor, " rows"]:
        """The error of each row of one weight, ``H`` not damped."""
        factored, own = self.starts[index].factored, self.own[index]
        norm = weighted_squares(factored.live[None], self.W[:, own])[0]
        return (self.residual[own] - factored.damp * norm).clamp_(min=0)

    def _run(self, start: int, stop: int) -> None:
        """Quantize the columns ``start .. stop``; ``W^`` holds all errors before ``start``."""
        count = stop - start
        for unit in self.units:
            if start % unit == 0 and stop == min(start + unit, len(self.group)):
                self._begin(unit, start, stop)
        if count <= min([self.blocksize, *self.units[-1:]]):
            self._one_by_one(start, stop)
            return
        unit = next((unit for unit in self.units if count > unit), self.blocksize)
        half = middle(start, stop, unit)
        self._run(start, half)
        left, right = slice(start, half), slice(half, stop)
        for each, own in zip(self.starts, self.own, strict=True):
            self.W_hat[right, own].addmm_(each.factored.N[left, right].T, self.W[left, own])
        self._run(half, stop)

    def _begin(self, unit: int, start: int, stop: int) -> None:
        """The sweep reaches the first of these columns: of a group, whose grid is fitted."""
        columns = slice(start, stop)
        self._fit_group(columns, [self._updated(columns, i) for i in range(len(self.starts))])

    def _updated(self, columns: slice, index: int) -> Float[Tensor, "width rows"]:
        """These columns of one weight as the paper's form holds them when it reaches the first."""
        N, own = self.starts[index].factored.N[columns, columns], self.own[index]
        one = torch.eye(len(N), dtype=N.dtype, device=N.device)
        inverse = torch.linalg.solve_triangular(N, one, upper=True, unitriangular=True)
        sums = self.W_hat[columns, own] - self.W[columns, own]
        return torch.addmm(self.W[columns, own], inverse.T, sums)

    def _fit_group(self, columns: slice, updated: Sequence[Float[Tensor, "width rows"]]) -> None:
        group = self.group[columns.start]
        for each, own, weights in zip(self.starts, self.own, updated, strict=True):
            near = (each.near[0][group], each.near[1][group])
            scale, zero = self.grid.fit(weights, self.storage, each.importance[columns], near)
            self.scale[group, own], self.zero[group, own] = scale, zero
        self.snaps[group] = self.grid.snapping(self.zero[group])

    def _one_by_one(self, start: int, stop: int) -> None:
        columns, count = slice(start, stop), len(self.starts)
        if self.levels is not None and self.keep is None and serves(self.W):
            self._compiled(start, stop, self.levels)
            return
        if self.levels is not None and self.on_gpu:
            from optq.core.triton_columns import column_loop

            factors = [each.factored for each in self.starts]
            tensors = (self.W_hat, self.W, self.codes, self.scale, self.zero, self.residual)
            column_loop(columns, factors, self.group_of, self.levels, *tensors)
            return
        block, steps = self.W_hat[columns], self.steps[: stop - start]
        inside = [each.factored.N[columns, columns] for each in self.starts]
        spreads = inside[0] if count == 1 else torch.stack(inside, dim=-1)[..., None]
        ahead = block.view(len(block), count, -1)
        rows = zip(self.group[columns], block, self.W[columns], steps, spreads, strict=True)
        for j, (group, w_hat, w, step, spread) in enumerate(rows, start=1):
            scale = self.scales[group]
            self.snaps[group](torch.div(w_hat, scale, out=step))
            if self.keep is not None:
                step.mul_(self.keep[start + j - 1])  # 0 is a value of every grid
            w_hat.addcmul_(step, scale, value=-1)  # w^ - q
            w.addcmul_(step, scale, value=-1)  # e
            if count == 1:
                block[j:].addr_(spread[j:], w)
            else:
                ahead[j:].addcmul_(spread[j:], w.view(count, -1))
        self.codes[columns] = self.grid.code(steps, self.zero[self.group_of[columns]])
        for each, own in zip(self.starts, self.own, strict=True):
            self.residual[own] += each.factored.squares[columns] @ block[:, own].square()

    def _compiled(self, start: int, stop: int, largest: int) -> None:
        """The same in a compiled loop; ``largest``: of the codes."""
        columns, grids = slice(start, stop), (self.scale, self.zero, self.group_of)
        levels, magic = numbers(self.W, largest, MAGIC[self.W.dtype])
        for each, own in zip(self.starts, self.own, strict=True):
            inside, squares = each.factored.N[columns, columns], each.factored.squares[columns]
            by_rows(
                *("sweep", own.start, own.stop, self.W_hat, self.W, self.codes),
                *(self.residual, inside, squares, *grids, start, stop, levels, magic),
            )


def _on_gpu(W: Tensor) -> bool:
    """Whether the column loop is a kernel: see :mod:`optq.core.triton_columns`."""
    return W.is_cuda and W.dtype == torch.float32 and triton_serves(W.device)


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    """Side by side; one alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors], dim=1)
