"""Loops over single weights, compiled by Numba where it is installed: see :mod:`optq.core.loops`.

torch starts an operation in a few microseconds. A loop over columns, whose operations each touch a
few thousand weights, waits for that most of the time; compiled, it waits for nothing. Where Numba
is not installed, or tensors are on another device, the same is done by torch's operations: results
differ by the last bits of sums.

Rows are independent: threads take ranges of them, and any number of threads gives the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

FEW = 256  # rows that one thread does before another could start
MAGIC = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}  # x + M - M rounds half to even


def compiling(loop: Callable[..., Any], **options: Any) -> Any:
    """The loop as Numba compiles it when it is first called, kept on disk where that can be."""
    from numba import njit

    try:
        return njit(cache=True, nogil=True, error_model="numpy", **options)(loop)
    except RuntimeError:  # no folder to keep it in can be written
        return njit(nogil=True, error_model="numpy", **options)(loop)


@cache
def loops() -> Any:
    """The compiled loops, or None where there are none."""
    try:
        from optq.core import loops as found
    except ImportError:
        return None
    return found


@cache
def pruning_loops() -> Any:
    """Those of pruning, or None."""
    try:
        from optq.core import pruning_loops as found
    except ImportError:
        return None
    return found


def serves(tensor: Tensor) -> bool:
    """Whether the compiled loops can work on a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in MAGIC and loops() is not None


def by_rows(loop: Callable[..., None], first: int, last: int, *arguments: Any) -> None:
    """``loop(*arguments, first, last)`` in as many threads as torch has, a range of rows each."""
    given = [each.numpy() if isinstance(each, Tensor) else each for each in arguments]
    parts = min(torch.get_num_threads(), -(-(last - first) // FEW))
    if parts <= 1:
        loop(*given, first, last)
        return
    ends = [first + (last - first) * part // parts for part in range(parts + 1)]
    pool = _pool(os.getpid(), torch.get_num_threads())
    list(pool.map(lambda ends: loop(*given, *ends), pairwise(ends)))  # or what one of them raised


def numbers(like: Tensor, *values: int | float) -> Iterator[Any]:
    """Python's numbers in the dtype of a tensor, as a compiled loop wants them."""
    kind = np.float64 if like.dtype == torch.float64 else np.float32
    return map(kind, values)


@cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """One for each process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, "optq")
