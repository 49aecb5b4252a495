"""Round-to-nearest: every weight to the nearest value of its grid. The baseline."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.error import exact_error
from optq.core.grid import GridSpec, Storage
from optq.core.hessian import find_dead
from optq.core.solution import Aim, Solution
from optq.core.weight import group_index


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
        aim: Aim | None = None,
    ) -> Solution:
        """Round ``weight``; or what ``aim`` gives, as in :meth:`GPTQ.solve`, on the same grids.

        ``H`` (not damped) measures the error, finds dead columns, and its diagonal weighs the
        columns where the range of a grid is searched.
        """
        start = time.perf_counter()
        dead = find_dead(H)
        W = working_copy(weight, dead)
        group = group_index(len(W), self.grid.width(len(W)), W.device)
        rounded = round_groups(W, group, self.grid, storage, H.diagonal()[:, None])
        rtn_error = exact_error(rounded.miss, H)
        solution = Solution(
            wbits=self.wbits,
            codes=rounded.codes.T.contiguous(),
            scales=rounded.scale.T.contiguous(),
            zeros=rounded.zero.to(torch.uint8).T.contiguous(),
            g_idx=group,
            error=rtn_error,
            rtn_error=rtn_error,
            dead=int(dead.sum()),
        )
        if aim is not None:
            scale, zero = rounded.scale[group], rounded.zero[group]
            target = working_copy(aim(None, None), dead)
            steps = nearest(target, scale, -zero, self.grid.levels - zero)
            error = exact_error(W - steps * scale, H)
            solution = replace(solution, codes=(steps + zero).to(torch.uint8).T.contiguous())
            solution = no_worse(solution, rounded, None, error, rtn_error)
        return replace(solution, seconds={"factor": 0.0, "solve": elapsed(start, W)})


def working_copy(
    weight: Float[Tensor, "rows cols"],
    dead: Bool[Tensor, " cols"],
    order: Int[Tensor, " cols"] | None = None,
) -> Float[Tensor, "cols rows"]:
    """The transposed weights, at least float32, zero where the input is always zero.

    The columns come in ``order``; ``dead`` is in that order already.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    W = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if order is not None:
        W = W[order]
    W[dead] = 0
    return W


@dataclass(frozen=True)
class Rounded:
    """Every weight on the nearest value of its own grid; transposed, as the solvers hold it."""

    codes: UInt8[Tensor, "cols rows"]
    scale: Float[Tensor, "groups rows"]
    zero: Float[Tensor, "groups rows"]
    miss: Float[Tensor, "cols rows"]  # W - Q


def round_groups(
    W: Float[Tensor, "cols rows"],
    group: Int[Tensor, " cols"],
    grid: GridSpec,
    storage: Storage,
    importance: Float[Tensor, "cols 1"],
    miss_dtype: torch.dtype | None = None,
) -> Rounded:
    """Fit a grid to each group of columns, and round; group by group, to stay in the cache.

    ``importance`` of each column is the Hessian's diagonal: see :meth:`GridSpec.fit`.
    """
    groups = int(group.max()) + 1
    scale, zero = W.new_empty(groups, W.shape[1]), W.new_empty(groups, W.shape[1])
    codes = torch.empty_like(W, dtype=torch.uint8)
    miss = torch.empty_like(W, dtype=miss_dtype)
    for index, columns in enumerate(members(group)):
        part = W[columns]
        scale[index], zero[index] = grid.fit(part, storage, importance[columns])
        steps = nearest(part, scale[index], -zero[index], grid.levels - zero[index])
        codes[columns] = (steps + zero[index]).to(torch.uint8)
        miss[columns] = (part - steps.mul_(scale[index])).to(miss.dtype)
    return Rounded(codes, scale, zero, miss)


def no_worse(
    solution: Solution,
    rounded: Rounded,
    places: Int[Tensor, " cols"] | None,
    error: Float[Tensor, " rows"],
    rtn_error: Float[Tensor, " rows"],
) -> Solution:
    """``solution``, but the rounded codes and grids in rows whose ``error`` is above rounding's.

    ``rounded`` holds column ``k`` of the weight at ``places[k]`` (None: in order). The tensors of
    ``solution`` are changed in place.
    """
    worse = (error > rtn_error).nonzero().flatten()
    codes = rounded.codes[:, worse].T
    codes = codes if places is None else codes[:, places]
    scales, zeros = rounded.scale[:, worse].T, rounded.zero[:, worse].T.to(torch.uint8)
    # Where the two agree, their errors differ in the last bits only.
    agree = (solution.codes[worse] == codes).all(1) & (solution.scales[worse] == scales).all(1)
    solution.codes[worse], solution.scales[worse], solution.zeros[worse] = codes, scales, zeros
    return replace(
        solution,
        error=torch.minimum(error, rtn_error),
        rtn_error=rtn_error,
        fallback_rows=int((~agree).sum()),
    )


def members(group: Int[Tensor, " cols"]) -> list[slice | Tensor]:
    """The columns of each group: a slice where they are consecutive."""
    found: list[slice | Tensor] = []
    for index in range(int(group.max()) + 1):
        columns = (group == index).nonzero().flatten()
        first, last = int(columns[0]), int(columns[-1])
        consecutive = last - first + 1 == len(columns)
        found.append(slice(first, last + 1) if consecutive else columns)
    return found


def nearest(weight: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """The steps from zero, ``c - z``, of the value nearest to each weight."""
    steps = (weight / scale).round_()
    return torch.clamp(steps, lowest, highest, out=steps)
