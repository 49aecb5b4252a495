"""Round-to-nearest: every weight to the nearest value of its grid. The baseline."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.grid import GridSpec, Storage
from optq.core.hessian import find_dead
from optq.core.solution import Solution, group_index


@dataclass(frozen=True)
class RTN:
    """Round to nearest on grids of ``wbits`` bits; options as in :class:`optq.core.grid.GridSpec`.

    Errors: ``SettingError`` for a width or group size that does not exist.
    """

    wbits: int
    groupsize: int = -1
    sym: bool = True
    mse: bool = False

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  refuses bad options here, not an hour later

    @property
    def grid(self) -> GridSpec:
        return GridSpec(self.wbits, self.groupsize, self.sym, self.mse)

    def solve(
        self,
        weight: Float[Tensor, "rows cols"],
        H: Float[Tensor, "cols cols"],
        storage: Storage = Storage(),
    ) -> Solution:
        """Round ``weight``; ``H`` (not damped) only measures the error and finds dead columns."""
        start = time.perf_counter()
        dead = find_dead(H)
        W = working_copy(weight, dead)
        grid, columns = self.grid, W.shape[0]
        scale, zero = grid.fit_all(W, storage)
        group = group_index(columns, grid.width(columns), W.device)
        steps = round_columns(W, scale, zero, group, grid.levels)
        miss = W - steps * scale[group]
        error = (miss * (H @ miss)).sum(0).clamp_(min=0)
        return Solution(
            wbits=self.wbits,
            sym=self.sym,
            codes=(steps + zero[group]).to(torch.uint8).T.contiguous(),
            scales=scale.T.contiguous(),
            zeros=zero.to(torch.uint8).T.contiguous(),
            g_idx=group,
            error=error,
            rtn_error=error,
            energy=(W * (H @ W)).sum(0),
            dead=int(dead.sum()),
            seconds={"factor": 0.0, "solve": elapsed(start, W)},
        )


def working_copy(weight: Tensor, dead: Tensor) -> Float[Tensor, "cols rows"]:
    """The transposed weights, at least float32, zero where the input is always zero."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    W = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    W[dead] = 0
    return W


def round_columns(
    W: Float[Tensor, "cols rows"],
    scale: Float[Tensor, "groups rows"],
    zero: Float[Tensor, "groups rows"],
    group: Tensor,
    levels: int,
) -> Float[Tensor, "cols rows"]:
    """The steps from zero, ``c - z``, of the value nearest to each weight."""
    steps = (W / scale[group]).round_()
    return torch.clamp(steps, -zero[group], levels - zero[group], out=steps)
