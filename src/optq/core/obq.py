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

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.error import undamped_error
from optq.core.grid import GridSpec, Storage
from optq.core.hessian import check_percdamp, factor
from optq.core.obs import eliminate
from optq.core.rtn import nearest, no_worse, round_groups, working_copy
from optq.core.solution import Aim, Solution
from optq.core.weight import group_index

ENTRIES_AT_ONCE = 2**26  # of the rows' inverse Hessians: 256 MB in float32


@dataclass(frozen=True)
class OBQ:
    """The options of OBQ; they mean what they mean for :class:`optq.core.gptq.GPTQ`."""

    wbits: int
    groupsize: int = -1
    sym: bool = True
    percdamp: float = 0.01
    mse: bool = False

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  refuses bad options here, not an hour later
        check_percdamp(self.percdamp)

    @property
    def grid(self) -> GridSpec:
        return GridSpec(self.wbits, self.groupsize, self.sym, self.mse)

    def solve(
        self,
        weight: Float[Tensor, "rows cols"],
        H: Float[Tensor, "cols cols"],
        storage: Storage = Storage(),
        aim: Aim | None = None,
    ) -> Solution:
        """Codes for ``weight`` or ``aim``, under ``H``, not damped: as :meth:`GPTQ.solve`."""
        start = time.perf_counter()
        columns, grid = H.shape[0], self.grid
        factored = factor(H, self.percdamp)
        inverse = torch.cholesky_inverse(factored.U.flip(0, 1)).flip(0, 1)
        factor_seconds = elapsed(start, H)

        start = time.perf_counter()
        W = working_copy(weight, factored.dead)
        group = group_index(columns, grid.width(columns), H.device)
        rounded = round_groups(W, group, grid, storage, H.diagonal()[:, None])
        scale, zero = rounded.scale[group], rounded.zero[group]  # of each weight
        target = W if aim is None else working_copy(aim(factored, None), factored.dead)
        at_once = max(1, ENTRIES_AT_ONCE // columns**2)
        steps = torch.cat(
            [
                _greedy(w, s, z, inverse, grid.levels)
                for w, s, z in zip(
                    *(x.T.split(at_once) for x in (target, scale, zero)), strict=True
                )
            ]
        ).T
        error = undamped_error(W - steps * scale, factored)
        rtn_error = undamped_error(rounded.miss, factored)
        solution = Solution(
            wbits=self.wbits,
            codes=(steps + zero).to(torch.uint8).T.contiguous(),
            scales=rounded.scale.T.contiguous(),
            zeros=rounded.zero.to(torch.uint8).T.contiguous(),
            g_idx=group,
            error=error,
            rtn_error=rtn_error,
            damp=factored.damp,
            damp_tries=factored.tries,
            dead=int(factored.dead.sum()),
        )
        solution = no_worse(solution, rounded, None, error, rtn_error)
        return replace(solution, seconds={"factor": factor_seconds, "solve": elapsed(start, H)})


def _greedy(
    W: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "rows cols"],
    zero: Float[Tensor, "rows cols"],
    inverse: Float[Tensor, "cols cols"],
    levels: int,
) -> Float[Tensor, "rows cols"]:
    """The steps from zero ``c - z`` of every weight, each row in its own order."""
    W = W.clone(memory_format=torch.contiguous_format)
    rows, columns = W.shape
    each = torch.arange(rows, device=W.device)
    inverses = inverse.expand(rows, columns, columns).clone(memory_format=torch.contiguous_format)
    steps = torch.empty_like(W)
    left = torch.ones_like(W, dtype=torch.bool)
    for _ in range(columns):
        closest = nearest(W, scale, -zero, levels - zero)
        pivots = inverses.diagonal(dim1=1, dim2=2)
        cost = (closest * scale - W).square_() / pivots
        p = cost.masked_fill_(~left, torch.inf).argmin(1)
        steps[each, p] = closest[each, p]
        left[each, p] = False
        miss = W[each, p] - (closest * scale)[each, p]
        W -= (miss / pivots[each, p])[:, None] * inverses[each, :, p]
        eliminate(inverses, p)
    return steps
