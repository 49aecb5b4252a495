"""What Numba compiles of the range search: see :mod:`optq.core.loops`."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import prange

from optq.core.compiled import TILE, compiling, in_threads

CHECKED = 8  # columns, after which a loss may be too large already


@compiling
@no_type_check
def _loss(part, weigh, rows, scale, zero, levels, magic, most, loss):
    """What rounding to its grid costs each row of a tile; or how much it is, when all are above
    ``most``.
    """
    one = levels / levels  # a literal would make it float64
    inverse = np.empty(TILE, part.dtype)
    for r in range(rows):
        inverse[r] = one / scale[r]
        loss[r] = 0
    for k in range(len(part)):
        own, much = part[k], weigh[k]
        for r in range(rows):
            low = -zero[r]
            high = levels + low
            unit = own[r] * inverse[r]
            unit = unit if unit > low else low
            unit = unit if unit < high else high
            unit = (unit + magic) - magic
            miss = own[r] - unit * scale[r]
            loss[r] += much * (miss * miss)
        if k % CHECKED == CHECKED - 1:
            below = 0
            for r in range(rows):
                below += loss[r] < most[r]
            if below == 0:
                return


@compiling
@no_type_check
def _grids(rows, low, high, below, above, sym, levels, half, least, magic, scale, zero):
    """Scales and zero points for the ends ``below * low`` and ``above * high``."""
    one = levels / levels
    for r in range(rows):
        if sym:
            extent = (one + one) * max(high[r], -low[r])
            s, z = extent * below[r] / levels, half
        else:
            bottom, top = low[r] * below[r], high[r] * above[r]
            extent = top - bottom
            s = extent / levels
            z = ((-bottom / s) + magic) - magic
            if least > 0 and z < least and top > 0:
                s = top / (levels - least)
            z = min(max(z, least), levels)
        scale[r], zero[r] = (one, half) if extent == 0 else (s, z)


@compiling
@no_type_check
def search(
    group,
    weigh,
    low,
    high,
    near,
    sym,
    levels,
    half,
    least,
    magic,
    margin,
    starts,
    fine,
    ends,
    first,
    last,
):
    """The range search of a group, whose columns count as much as they ``weigh``.

    ``ends [2, rows]`` becomes the factors of the best grid's ends, ``low`` and ``high``. After 1,
    those in ``near [2, rows]`` are tried, or, where there are none, the others of ``starts``; then
    moves by the steps ``fine``: see :mod:`optq.core.grid`.
    """
    part = np.empty((len(group), TILE), group.dtype)
    kind = group.dtype  # one array each: rows of one array would not be known to be contiguous
    below, above = np.empty(TILE, kind), np.empty(TILE, kind)
    scale, zero = np.empty(TILE, kind), np.empty(TILE, kind)
    most, loss = np.empty(TILE, kind), np.empty(TILE, kind)
    least_loss, now_below, now_above = (
        np.empty(TILE, kind),
        np.empty(TILE, kind),
        np.empty(TILE, kind),
    )
    one = levels / levels
    for top in range(first, last, TILE):
        end = min(top + TILE, last)
        rows = end - top
        lowest, highest = low[top:end], high[top:end]
        best_below, best_above = ends[0, top:end], ends[1, top:end]
        for r in range(rows):
            least_loss[r], best_below[r], best_above[r] = np.inf, one, one
        for k in range(len(group)):
            own, source = part[k], group[k, top : top + rows]
            for r in range(rows):
                own[r] = source[r]
        tries = 2 if near.shape[1] else len(starts)
        moves = len(fine) * (1 if sym else 2)
        for attempt in range(tries + moves):
            move = attempt - tries
            step, other = one - one, False
            if move >= 0:
                step, other = fine[move // (1 if sym else 2)], not sym and move % 2 == 1
            for r in range(rows):
                now_below[r], now_above[r] = best_below[r], best_above[r]
            for sign in (one, -one):
                for r in range(rows):
                    if move >= 0:
                        below[r] = now_below[r] + (one - one if other else sign * step)
                        above[r] = now_above[r] + (sign * step if other else one - one)
                    elif attempt == 1 and near.shape[1]:
                        below[r], above[r] = sign * near[0, top + r], near[1, top + r]
                    else:
                        below[r], above[r] = sign * starts[attempt], starts[attempt]
                if sign < 0 and move < 0 and not sym:
                    continue
                _grids(
                    rows,
                    lowest,
                    highest,
                    below,
                    above,
                    sym,
                    levels,
                    half,
                    least,
                    magic,
                    scale,
                    zero,
                )
                for r in range(rows):
                    most[r] = least_loss[r] * margin
                _loss(part, weigh, rows, scale, zero, levels, magic, most, loss)
                for r in range(rows):
                    if loss[r] < most[r]:
                        least_loss[r], best_below[r], best_above[r] = loss[r], below[r], above[r]


@in_threads
@no_type_check
def search_in_threads(first, last, *given):
    for tile in prange((last - first + TILE - 1) // TILE):
        top = first + tile * TILE
        search(*given, top, min(top + TILE, last))
