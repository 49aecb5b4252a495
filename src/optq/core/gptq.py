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

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.grid import GridSpec, Storage
from optq.core.hessian import Factor, check_percdamp, factor, row_error, worse_than
from optq.core.rtn import round_columns, working_copy
from optq.core.solution import Solution, group_index
from optq.errors import SettingError


@dataclass(frozen=True)
class GPTQ:
    """The options of GPTQ.

    ``wbits``: 2, 3, 4 or 8. ``groupsize``: columns that share a scale; -1: one scale to a row.
    ``sym``: zero point in the middle. ``actorder``: sweep the columns by falling ``diag H``.
    ``percdamp``: damping as a fraction of the mean of ``diag H``. ``mse``: search the range of
    each grid instead of taking its extremes. ``static_groups``: fit all grids on the original
    weights before the sweep, so that act-order needs no ``g_idx`` in the file. ``blocksize``:
    columns swept one by one before their errors go on in a matrix product; speed only.
    """

    wbits: int
    groupsize: int = -1
    sym: bool = True
    actorder: bool = False
    percdamp: float = 0.01
    mse: bool = False
    static_groups: bool = False
    blocksize: int = 32

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  refuses bad options here, not an hour later
        check_percdamp(self.percdamp)
        if self.blocksize < 1:
            raise SettingError(f"blocksize is {self.blocksize}", "choose 1 or more")

    @property
    def grid(self) -> GridSpec:
        return GridSpec(self.wbits, self.groupsize, self.sym, self.mse)

    def solve(
        self,
        weight: Float[Tensor, "rows cols"],
        H: Float[Tensor, "cols cols"],
        storage: Storage = Storage(),
    ) -> Solution:
        """Codes for ``weight`` (one layer, or all layers of a site stacked) under ``H``, undamped.

        Works in float32, or float64 for float64 weights. Raises ``NumericsError`` if ``H`` is
        not finite.
        """
        start = time.perf_counter()
        columns, grid = H.shape[0], self.grid
        width = grid.width(columns)
        order = None
        if self.actorder:
            order = torch.argsort(H.diagonal(), descending=True, stable=True)
            H = H[order][:, order]
        factored = factor(H, self.percdamp)
        factor_seconds = elapsed(start, H)

        start = time.perf_counter()
        group = group_index(columns, width, H.device)
        dead = factored.dead
        W = working_copy(weight if order is None else weight[:, order], dead)
        if self.static_groups and order is not None:
            original = torch.empty_like(W)
            original[order] = W
            rounded_scale, rounded_zero = grid.fit_all(original, storage)
            del original
            group = group[order]
        else:
            rounded_scale, rounded_zero = grid.fit_all(W, storage)
        sweep = _Sweep(W, factored, grid, storage, group, self.blocksize)
        if self.static_groups or width == columns:
            sweep.use_grids(rounded_scale, rounded_zero)
        sweep.run(0, columns)

        rounded = round_columns(W, rounded_scale, rounded_zero, group, grid.levels)
        rounded_miss = W - rounded * rounded_scale[group]
        error = sweep.row_error()
        worse, rtn_error = worse_than(error, rounded_miss, factored)
        del rounded_miss
        steps, scale, zero = sweep.steps, sweep.scale, sweep.zero
        if worse.numel():
            steps[:, worse] = rounded[:, worse]
            scale[:, worse] = rounded_scale[:, worse]
            zero[:, worse] = rounded_zero[:, worse]
            error[worse] = rtn_error[worse]
        codes = steps.add_(zero[group]).to(torch.uint8)
        if order is not None:
            inverse = torch.argsort(order)
            codes, group = codes[inverse], group[inverse]
        return Solution(
            wbits=self.wbits,
            sym=self.sym,
            codes=codes.T.contiguous(),
            scales=scale.T.contiguous(),
            zeros=zero.to(torch.uint8).T.contiguous(),
            g_idx=group,
            error=error,
            rtn_error=rtn_error,
            energy=row_error(W, factored),
            damp=factored.damp,
            damp_tries=factored.tries,
            dead=int(dead.sum()),
            fallback_rows=worse.numel(),
            seconds={"factor": factor_seconds, "solve": elapsed(start, H)},
        )


class _Sweep:
    """The sweep over the columns of one ``W``; its tensors are ``[cols, rows]``."""

    def __init__(
        self,
        W: Tensor,
        factored: Factor,
        grid: GridSpec,
        storage: Storage,
        group: Tensor,
        blocksize: int,
    ) -> None:
        self.W, self.grid, self.storage = W, grid, storage
        self.factored, self.blocksize = factored, blocksize
        self.N = factored.U / factored.U.diagonal()
        self.W_hat = W.clone()  # w^ on the right of the sweep, w^ - q on its left
        self.E = torch.empty_like(W)
        self.steps = torch.empty_like(W)  # c - z
        self.scale = W.new_empty(int(group.max()) + 1, W.shape[1])
        self.zero = torch.empty_like(self.scale)
        self.lowest, self.highest = torch.empty_like(self.scale), torch.empty_like(self.scale)
        self.group = group.tolist()
        self.dynamic = True

    def use_grids(self, scale: Tensor, zero: Tensor) -> None:
        """Sweep on grids fitted beforehand."""
        self.dynamic = False
        self.scale.copy_(scale)
        self._set_zero(slice(None), zero)

    def run(self, start: int, stop: int) -> None:
        """Quantize the columns ``start .. stop``; ``W^`` holds all errors before ``start``."""
        count, width = stop - start, self.grid.width(len(self.group))
        if self.dynamic and start % width == 0 and stop == min(start + width, len(self.group)):
            self._fit_group(start, stop)
        if count <= (min(self.blocksize, width) if self.dynamic else self.blocksize):
            self._columns(start, stop)
            return
        unit = width if self.dynamic and count > width else self.blocksize
        middle = start + unit * max(1, count // unit // 2)
        self.run(start, middle)
        left, right = slice(start, middle), slice(middle, stop)
        self.W_hat[right].addmm_(self.N[left, right].T, self.E[left])
        self.run(middle, stop)

    def row_error(self) -> Float[Tensor, " rows"]:
        """The error of each row, from the residuals that the sweep left behind."""
        pivots = self.factored.U.diagonal().square()[:, None]
        damped = (self.W_hat.square() * pivots).sum(0)
        return damped.sub_(self.E.square().sum(0), alpha=self.factored.damp).clamp_(min=0)

    def _set_zero(self, group: int | slice, zero: Tensor) -> None:
        self.zero[group] = zero
        self.lowest[group] = -zero
        self.highest[group] = self.grid.levels - zero

    def _fit_group(self, start: int, stop: int) -> None:
        columns = slice(start, stop)
        sums = self.W_hat[columns] - self.W[columns]
        inverse_of = self.N[columns, columns].T
        updated = torch.linalg.solve_triangular(inverse_of, sums, upper=False, unitriangular=True)
        scale, zero = self.grid.fit(updated.add_(self.W[columns]), self.storage)
        self.scale[self.group[start]] = scale
        self._set_zero(self.group[start], zero)

    def _columns(self, start: int, stop: int) -> None:
        quantized = torch.empty_like(self.W[0])
        for j in range(start, stop):
            group, w_hat, steps = self.group[j], self.W_hat[j], self.steps[j]
            scale = self.scale[group]
            torch.div(w_hat, scale, out=steps).round_()
            torch.clamp(steps, self.lowest[group], self.highest[group], out=steps)
            torch.mul(steps, scale, out=quantized)
            w_hat.sub_(quantized)
            torch.sub(self.W[j], quantized, out=self.E[j])
            if j + 1 < stop:
                self.W_hat[j + 1 : stop].addr_(self.N[j, j + 1 : stop], self.E[j])
