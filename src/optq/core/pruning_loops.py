"""What Numba compiles of pruning: the column loops of the sweep, as in :mod:`optq.core.loops`."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import prange

from optq.core.compiled import TILE, compiling, in_threads


@compiling
@no_type_check
def prune(W_hat, W, codes, residual, keep, N, squares, start, stop, first, last):
    """Columns ``start .. stop`` of rows ``first .. last``: each weight becomes 0, or stays.

    As :func:`optq.core.loops.sweep`; what ``codes`` have is the mask.
    """
    count, kind = stop - start, W.dtype
    ahead = np.empty((count, TILE), kind)
    error = np.empty(TILE, kind)
    for top in range(first, last, TILE):
        end = min(top + TILE, last)
        rows = end - top
        for j in range(count):
            own, source = ahead[j], W_hat[start + j, top:end]
            for r in range(rows):
                own[r] = source[r]
        for j in range(count):
            own, w, code = ahead[j], W[start + j, top:end], codes[start + j, top:end]
            stays, total, square = keep[start + j, top:end], residual[top:end], squares[j]
            for r in range(rows):
                value = own[r] if stays[r] else own[r] - own[r]
                code[r] = np.uint8(value != 0)
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
def round_kept(
    W_hat,
    W,
    codes,
    residual,
    keep,
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
    """The same where what stays is rounded to its grid."""
    count, kind = stop - start, W.dtype
    ahead = np.empty((count, TILE), kind)
    error = np.empty(TILE, kind)
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
            stays, total, square = keep[start + j, top:end], residual[top:end], squares[j]
            for r in range(rows):
                low = -z[r]
                high = levels + low
                unit = own[r] / s[r]
                unit = unit if unit > low else low
                unit = unit if unit < high else high
                unit = (unit + magic) - magic
                unit = unit if stays[r] else unit - unit
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


@in_threads
@no_type_check
def prune_in_threads(first, last, *given):
    for tile in prange((last - first + TILE - 1) // TILE):
        top = first + tile * TILE
        prune(*given, top, min(top + TILE, last))


@in_threads
@no_type_check
def round_kept_in_threads(first, last, *given):
    for tile in prange((last - first + TILE - 1) // TILE):
        top = first + tile * TILE
        round_kept(*given, top, min(top + TILE, last))
