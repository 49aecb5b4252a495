"""What Numba compiles: the column loop of the sweep, the steps of polish, transposed copies.

Those of the range search and of pruning have files of their own, and are found here. Each does
what the torch operations beside its call do, a tile of rows at a time that stays in the fastest
cache. Tensors are ``[cols, rows]``: a vector of the processor holds weights of neighbouring rows.
Multiplications and additions are not fused or reordered, so that every processor gives the same
bits.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import prange

from optq.core.compiled import TILE, compiling, in_threads
from optq.core.pruning_loops import prune, prune_in_threads, round_kept, round_kept_in_threads
from optq.core.range_search import search, search_in_threads

__all__ = [
    "descend",
    "descend_in_threads",
    "prune",
    "prune_in_threads",
    "round_kept",
    "round_kept_in_threads",
    "search",
    "search_in_threads",
    "sweep",
    "sweep_in_threads",
    "transpose",
]


@compiling
@no_type_check
def sweep(
    W_hat,
    W,
    codes,
    residual,
    N,
    squares,
    scale,
    zero,
    group,
    start,
    stop,
    levels,
    magic,
    first,
    last,
):
    """Columns ``start .. stop`` of a sweep, of rows ``first .. last``: rounded one by one, each
    one's error spread over those behind it.

    ``W`` becomes the errors; ``N`` and ``squares`` begin at ``start``, ``residual`` and ``N`` are
    of the weight that has the rows: see :class:`optq.core.sweep.Sweep`.
    """
    count = stop - start
    ahead = np.empty((count, TILE), W.dtype)
    error = np.empty(TILE, W.dtype)
    for top in range(first, last, TILE):
        end = min(top + TILE, last)
        rows = end - top
        for j in range(count):
            own, source = ahead[j], W_hat[start + j, top:end]
            for r in range(rows):
                own[r] = source[r]
        for j in range(count):
            own, w, code = ahead[j], W[start + j, top:end], codes[start + j, top:end]
            s, z = scale[group[start + j], top:end], zero[group[start + j], top:end]
            total, square = residual[top:end], squares[j]
            for r in range(rows):
                low = -z[r]
                high = levels + low
                unit = own[r] / s[r]
                unit = unit if unit > low else low
                unit = unit if unit < high else high
                unit = (unit + magic) - magic
                code[r] = np.uint8(np.int32(unit - low))
                value = unit * s[r]
                miss = own[r] - value
                total[r] += square * (miss * miss)
                error[r] = w[r] - value
                w[r] = error[r]
            for k in range(j + 1, count):
                spread, later = N[j, k], ahead[k]
                for r in range(rows):
                    later[r] += spread * error[r]


@compiling
@no_type_check
def descend(
    gradient,
    steps,
    delta,
    scale,
    zero,
    twice_inverse,
    worth,
    H,
    at_once,
    levels,
    magic,
    first,
    last,
):
    """Of each ``at_once`` neighbouring columns of a block, the step of the one that gains most.

    See :meth:`optq.core.descent._Descent._visit`, which has the same in torch's operations.
    """
    count, kind = len(H), gradient.dtype
    own = np.empty((count, TILE), kind)
    inverse, best = np.empty(TILE, kind), np.empty(TILE, kind)
    moved, size = np.empty(TILE, kind), np.empty(TILE, kind)
    which = np.empty(TILE, np.int32)
    one = levels / levels
    half = one / (one + one)
    tiny = np.finfo(kind).tiny
    for top in range(first, last, TILE):
        end = min(top + TILE, last)
        rows = end - top
        s, z = scale[top:end], zero[top:end]
        for r in range(rows):
            inverse[r] = one / s[r]
        for k in range(count):
            target, source = own[k], gradient[k, top:end]
            for r in range(rows):
                target[r] = source[r]
        for left in range(0, count, at_once):
            for r in range(rows):
                best[r], moved[r], which[r] = tiny, 0, left
            for k in range(left, min(left + at_once, count)):
                slope, code, factor, much = own[k], steps[k, top:end], twice_inverse[k], worth[k]
                for r in range(rows):
                    low = -z[r]
                    high = levels + low
                    wish = (slope[r] * factor) * inverse[r]
                    unit = code[r] + half * wish
                    unit = unit if unit > low else low
                    unit = unit if unit < high else high
                    change = ((unit + magic) - magic) - code[r]
                    gain = ((wish - change) * change) * much
                    better = gain > best[r]
                    best[r] = gain if better else best[r]
                    moved[r] = change if better else moved[r]
                    which[r] = np.int32(k) if better else which[r]
            anything = False
            for r in range(rows):
                size[r] = moved[r] * s[r]
                if moved[r] != 0:
                    anything = True
                    steps[which[r], top + r] += moved[r]
                    delta[which[r], top + r] -= size[r]
            if anything:
                for k in range(count):
                    target, across = own[k], H[k]
                    for r in range(rows):
                        target[r] -= across[which[r]] * size[r]
        for k in range(count):
            source, target = own[k], gradient[k, top:end]
            for r in range(rows):
                target[r] = source[r]


@in_threads
@no_type_check
def transpose(source, target):
    """``source [rows, cols]`` into ``target [cols, rows]``, of one dtype."""
    rows, cols = source.shape
    for tile in prange((rows + TILE - 1) // TILE):
        top, end = tile * TILE, min((tile + 1) * TILE, rows)
        for left in range(0, cols, TILE):
            for c in range(left, min(left + TILE, cols)):
                for r in range(top, end):
                    target[c, r] = source[r, c]


# The loops above, each tile of rows in one of Numba's threads. One function that takes the loop
# would be shorter, and Numba would not find what it kept of it.


@in_threads
@no_type_check
def sweep_in_threads(first, last, *given):
    for tile in prange((last - first + TILE - 1) // TILE):
        top = first + tile * TILE
        sweep(*given, top, min(top + TILE, last))


@in_threads
@no_type_check
def descend_in_threads(first, last, *given):
    for tile in prange((last - first + TILE - 1) // TILE):
        top = first + tile * TILE
        descend(*given, top, min(top + TILE, last))
