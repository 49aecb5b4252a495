"""What Numba compiles for :mod:`.cpu_blocks`: packed 4-bit codes become a blocked bfloat16 weight.

It is threaded by Numba itself, whose OpenMP is torch's own: threads of Python would compete with
those of torch, which wait for the next operation without sleep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from numba import njit, prange

HALF = 32  # rows whose codes lie in the low bits of a tile's bytes; as many lie in the high bits
LIFT = np.float32(2**23)  # whose last bits as a float32 are an integer's
LIFTED = np.uint32(0x4B000000)  # the same, its bits
ROUND, ODD, HIGH = np.uint32(0x7FFF), np.uint32(1), np.uint32(0xFFFF0000)
SHORT = np.uint32(16)


def _compiled(loop: Callable[..., Any], parallel: bool = False) -> Any:
    options = {"nogil": True, "error_model": "numpy", "parallel": parallel}
    try:
        return njit(cache=True, **options)(loop)
    except RuntimeError:  # no folder to keep it in can be written
        return njit(**options)(loop)


@_compiled
@no_type_check
def _value(code, zero, unit):
    """The bits of ``(code - zero) * unit``, exact in float32, rounded half to even to bfloat16.

    Those below bfloat16's are left over. ``zero`` is above 2^23, as the code is made to be.
    """
    bits = np.float32((np.uint32(code | LIFTED).view(np.float32) - zero) * unit).view(np.uint32)
    return np.uint32(bits + ROUND + ((bits >> SHORT) & ODD))


@_compiled
@no_type_check
def _pair(first, second, zero, unit):
    """Two neighbouring columns' weights in one word."""
    return (_value(first, zero, unit) >> SHORT) | (_value(second, zero, unit) & HIGH)


def _unpack(codes, more, units, zeros, lift, first, halves, weight):  # type: ignore[no-untyped-def]
    """Tiles from ``first`` into ``weight``, as many as that holds.

    ``codes [tiles, cols, 32]``, of 8 bits the low ones, and ``more`` the high ones or None;
    ``units [groups, rows, 2]`` whose ``[..., 0]`` are bfloat16's bits; ``zeros [its groups, rows]``
    with as many rows and as many or fewer groups; ``lift`` what codes were raised by. ``weight``
    is ``[tiles, 2, pairs, 32]`` where ``halves``, else ``[tiles, pairs, 2, 32]``, words of pairs.
    """
    groups, pairs = units.shape[0], codes.shape[1] // 2
    width, shared = pairs // groups, groups // zeros.shape[0]
    for job in prange(weight.shape[0] * groups):
        place, group = job // groups, job % groups
        tile = first + place
        unit, zero = np.empty(2 * HALF, np.float32), np.empty(2 * HALF, np.float32)
        for r in range(2 * HALF):
            row = tile * 2 * HALF + r
            unit[r] = np.uint32(np.uint32(units[group, row, 0]) << SHORT).view(np.float32)
            zero[r] = LIFT + np.float32(zeros[group // shared, row] + lift)
        for pair in range(group * width, (group + 1) * width):
            one, two = codes[tile, 2 * pair], codes[tile, 2 * pair + 1]
            if halves:
                low, high = weight[place, 0, pair], weight[place, 1, pair]
            else:
                low, high = weight[place, pair, 0], weight[place, pair, 1]
            if more is None:
                for r in range(HALF):
                    a, b, s = np.uint32(one[r]), np.uint32(two[r]), r + HALF
                    low[r] = _pair(a & 15, b & 15, zero[r], unit[r])
                    high[r] = _pair(a >> 4, b >> 4, zero[s], unit[s])
            else:
                three, four = more[tile, 2 * pair], more[tile, 2 * pair + 1]
                for r in range(HALF):
                    a, b, s = np.uint32(one[r]), np.uint32(two[r]), r + HALF
                    c, d = np.uint32(three[r]), np.uint32(four[r])
                    low[r] = _pair(a & 15 | (c & 15) << 4, b & 15 | (d & 15) << 4, zero[r], unit[r])
                    high[r] = _pair(a >> 4 | c & 240, b >> 4 | d & 240, zero[s], unit[s])


_compiled_unpack = _compiled(_unpack, parallel=True)


def unpack(*arguments: Any) -> None:
    """:func:`_unpack` in as many threads as torch has."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    _compiled_unpack(*arguments)
    if torch.get_num_threads() != threads:  # Numba's first start sets it for OpenMP as a whole
        torch.set_num_threads(threads)


def shares_threads() -> bool:
    """Whether Numba's threads are OpenMP's; its own abort where two callers meet."""
    return numba.threading_layer() == "omp"
