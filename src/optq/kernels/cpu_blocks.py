"""CPU: many rows of activations, by a weight that oneDNN need not rearrange.

A bfloat16 product of oneDNN, PyTorch's on a CPU, first brings its weight into blocks of 32 (with
AMX) or 64 rows, pairs of columns side by side: at few rows that takes longer than the product. A
tile of packed 4-bit codes is 64 rows, its bytes a half of them low and a half of them high: as
vectors they become such blocks in place, with no transposition. So a part of the weight, as much
as stays in the caches, is unpacked into a blocked weight that is kept, and multiplied from there.

The blocked weight is made by ``torch.ops.mkldnn._reorder_linear_weight``, written through its
``data_ptr`` and multiplied by ``_linear_pointwise``, the three operators that PyTorch's compiler
uses. They are no public interface: whether they are there, and how a block lies, is found out by
an example, and where either is not as expected :func:`scratch` is None and the caller goes
another way. So it is without Numba, and where Numba's threads are not OpenMP's.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optq.core.compiled import shares_threads

TILE = 64  # rows of a tile of packed codes, and of no less a part
# Of a part, for each thread: with fewer rows oneDNN leaves threads idle, and every part costs a
# call; more bytes are farther away.
ROWS = 2**10
BYTES = 2**23
MOST = 2**25  # bytes of a part


@dataclass(frozen=True)
class Scratch:
    """A blocked weight ``[rows, cols]`` to be written over and over; of one thread."""

    weight: Any  # oneDNN's
    words: NDArray[np.uint32]  # its memory: [tiles, cols, 32], a pair of columns in a word
    halves: bool  # whether a tile's first 32 rows are before all of its last 32

    def product(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for bfloat16 ``x [tokens, cols]``: ``[tokens, rows]``, sums in float32."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class _Kept(threading.local):
    """One thread's."""

    def __init__(self) -> None:
        self.parts: dict[tuple[int, int], Scratch | None] = {}


_kept = _Kept()
_ONE_THREAD = threading.Lock()


def scratch(rows: int, cols: int) -> Scratch | None:
    """This thread's, for whole tiles of rows and an even number of columns; None if unfit."""
    if (rows, cols) not in _kept.parts:
        _kept.parts[rows, cols] = _scratch(rows, cols)
    return _kept.parts[rows, cols]


def parts(rows: int, cols: int) -> range:
    """The first row of each part of a weight, all of one size but the last."""
    threads = torch.get_num_threads()
    most = max(TILE, min(ROWS * threads, min(MOST, BYTES * threads) // (2 * cols)))
    count = -(-rows // most)
    return range(0, rows, -(-rows // (count * TILE)) * TILE)


def loops() -> Any:
    """The compiled loop, or None where it cannot be had: also in a fork of a process that had it,
    where OpenMP would end the process.
    """
    unpack, _ = _compiled()
    return unpack if shares_threads() else None


def tiles() -> Any:
    """The compiled product of processors with AMX, or None where it cannot be had."""
    _, amx = _compiled()
    return amx if shares_threads() else None


def _compiled() -> tuple[Any, Any]:
    with _ONE_THREAD:  # compiles
        return _tried()


@cache
def _tried() -> tuple[Any, Any]:
    """The two modules or None; each has done nothing once, which compiles it."""
    try:
        from numba.core.errors import NumbaError
    except ImportError:
        return None, None
    found: list[Any] = []
    try:
        from optq.kernels import unpack

        if shares_threads():
            codes, units = np.empty((0, 32, 32), np.uint8), np.empty((1, 0, 2), np.uint16)
            zeros, nothing = np.empty((1, 0), np.uint8), np.empty((0, 32, 32), np.uint32)
            unpack.unpack(codes, None, units, zeros, 0, 0, True, nothing)
            found.append(unpack)
            from optq.kernels import amx

            if amx.serves():
                amx.multiply((codes, None, units, zeros), 0, torch.zeros(32, 32).bfloat16())
                found.append(amx)
    except (AttributeError, ImportError, NumbaError, RuntimeError, ValueError):
        # Another version of it: slower, and no result is another. Who wonders why can look.
        logging.getLogger(__name__).info("prompts are not compiled", exc_info=True)
    unpack, amx = [*found, None, None][:2]
    return unpack, amx


def _scratch(rows: int, cols: int) -> Scratch | None:
    if loops() is None:
        return None
    example = torch.arange(rows * cols, dtype=torch.int32).to(torch.int16).view(rows, cols)
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(example.view(torch.bfloat16), None)
        size = torch.ops.mkldnn._nbytes(weight)
        address = torch.ops.mkldnn.data_ptr(weight)
    except (AttributeError, RuntimeError):
        return None
    if size != example.nbytes:
        return None
    memory = (ctypes.c_uint32 * (size // 4)).from_address(address)
    words = np.ctypeslib.as_array(memory)
    pairs = example.view(rows // TILE, 2, 32, cols // 2, 2)
    for order in ((0, 1, 3, 2, 4), (0, 3, 1, 2, 4)):
        expected = pairs.permute(order).contiguous()
        if np.array_equal(words, expected.numpy().view(np.uint32).ravel()):
            return Scratch(weight, words.reshape(-1, cols, 32), order[1] == 1)
    return None
