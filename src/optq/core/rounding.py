"""Rounding to the nearest value of fitted grids: the baseline, and what every solver falls back on.

Everything is held transposed, ``[cols, rows]``, as the solvers hold it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from optq.core.compiled import transposed
from optq.core.grid import Grid, Storage
from optq.core.solution import Solution


@dataclass(frozen=True)
class Rounded:
    """Every weight on the nearest value of its own grid; ``miss`` is ``W - Q``."""

    codes: UInt8[Tensor, "cols rows"]
    scale: Float[Tensor, "groups rows"]
    zero: Float[Tensor, "groups rows"]
    miss: Float[Tensor, "cols rows"]


def working_copy(
    weight: Float[Tensor, "rows cols"], order: Int[Tensor, " cols"] | None = None
) -> Float[Tensor, "cols rows"]:
    """The transposed weights, at least float32, the columns in ``order``."""
    W = transposed(weight)
    W = W if order is None else W[order]
    return W.to(torch.promote_types(weight.dtype, torch.float32))


def round_groups(
    W: Float[Tensor, "cols rows"],
    group: Int[Tensor, " cols"],
    grid: Grid,
    storage: Storage,
    importance: Float[Tensor, "cols 1"],
    miss_dtype: torch.dtype | None = None,
) -> Rounded:
    """Fit a grid to each group of columns, and round; group by group, to stay in the cache.

    ``importance`` of each column: see :meth:`optq.core.grid.Grid.fit`.
    """
    groups = int(group.max()) + 1
    scale, zero = W.new_empty(groups, W.shape[1]), W.new_empty(groups, W.shape[1])
    codes = torch.empty_like(W, dtype=torch.uint8)
    miss = torch.empty_like(W, dtype=miss_dtype)
    for index, columns in enumerate(_members(group)):
        part = W[columns]
        scale[index], zero[index] = grid.fit(part, storage, importance[columns])
        codes[columns], values = grid.nearest(part, scale[index], zero[index])
        miss[columns] = torch.sub(part, values, out=values).to(miss.dtype)
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
    fell_back = torch.zeros_like(error, dtype=torch.bool)
    fell_back[worse[~agree]] = True
    return replace(
        solution, error=torch.minimum(error, rtn_error), rtn_error=rtn_error, fell_back=fell_back
    )


def _members(group: Int[Tensor, " cols"]) -> list[slice | Tensor]:
    """The columns of each group: a slice where they are consecutive."""
    found: list[slice | Tensor] = []
    for index in range(int(group.max()) + 1):
        columns = (group == index).nonzero().flatten()
        first, last = int(columns[0]), int(columns[-1])
        consecutive = last - first + 1 == len(columns)
        found.append(slice(first, last + 1) if consecutive else columns)
    return found
