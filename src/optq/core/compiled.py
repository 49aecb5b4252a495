"""Loops over single weights, compiled by Numba where it is installed: see :mod:`optq.core.loops`.

torch starts an operation in a few microseconds. A loop over columns, whose operations each touch a
few thousand weights, waits for that most of the time; compiled, it waits for nothing. Where Numba
is not installed, or tensors are on another device, the same is done by torch's operations: results
differ by the last bits of sums.

Rows are independent: threads take tiles of them, and any number of threads gives the same bits. The
threads are Numba's where those are OpenMP's, as torch's are, so that one pool serves both: Python's
would compete with torch's, which wait for the next operation without sleep.
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

TILE = 64  # rows that stay in a core's fastest cache
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MAGIC = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}  # x + M - M rounds half to even


def compiling(loop: Callable[..., Any], **options: Any) -> Any:
    """The loop as Numba compiles it when it is first called, kept on disk where that can be."""
    from numba import njit

    try:
        return njit(cache=True, nogil=True, error_model="numpy", **options)(loop)
    except RuntimeError:  # no folder to keep it in can be written
        return njit(nogil=True, error_model="numpy", **options)(loop)


def in_threads(loop: Callable[..., Any]) -> Any:
    """The same of a loop whose range is Numba's ``prange``."""
    return compiling(loop, parallel=True)


@cache
def loops() -> Any:
    """The compiled loops, or None where there are none."""
    try:
        from optq.core import loops as found
    except ImportError:
        return None
    return found


def serves(tensor: Tensor) -> bool:
    """Whether the compiled loops can work on a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in MAGIC and loops() is not None


def by_rows(loop: str, first: int, last: int, *arguments: Any) -> None:
    """One of the loops on the rows ``first .. last``, in as many threads as torch has.

    Its last arguments are a range of rows.
    """
    given = [each.numpy() if isinstance(each, Tensor) else each for each in arguments]
    threads = max(1, min(torch.get_num_threads(), -(-(last - first) // TILE)))
    if threads > 1 and shares_threads():
        use_threads()
        getattr(loops(), f"{loop}_in_threads")(first, last, *given)
        return
    ends = [first + (last - first) * part // threads for part in range(threads + 1)]
    run = getattr(loops(), loop)
    if threads == 1:
        run(*given, first, last)
        return
    pool = _pool(os.getpid(), torch.get_num_threads())
    list(pool.map(lambda ends: run(*given, *ends), pairwise(ends)))  # or what one of them raised


def use_threads() -> None:
    """As many of Numba's threads as torch has, from here on."""
    import numba

    most: int = vars(numba.config)["NUMBA_NUM_THREADS"]
    numba.set_num_threads(min(torch.get_num_threads(), most))


def shares_threads() -> bool:
    """Whether Numba's threads are OpenMP's: others abort where two callers meet. Not in a fork of
    a process that had them: OpenMP would end it.
    """
    process, shared = _started()
    return shared and process == os.getpid()


@cache
def _started() -> tuple[int, bool]:
    """The process that started Numba's threads, and whether they are OpenMP's."""
    threads = torch.get_num_threads()
    try:
        import numba

        numba.get_num_threads()
        shared = numba.threading_layer() == "omp"
    except (ImportError, ValueError):  # no Numba; a layer was asked for that is not there
        shared = False
    if torch.get_num_threads() != threads:  # the start sets it for OpenMP as a whole
        torch.set_num_threads(threads)
    return os.getpid(), shared


def transposed(matrix: Tensor) -> Tensor:
    """``[rows, cols]`` as ``[cols, rows]``, each column contiguous: a copy.

    torch does it in one thread.
    """
    kind = INTEGERS.get(matrix.element_size())  # of bfloat16 Numba knows nothing
    if matrix.device.type != "cpu" or kind is None or loops() is None or not shares_threads():
        return matrix.T.clone(memory_format=torch.contiguous_format)
    made = matrix.new_empty(*reversed(matrix.shape))
    use_threads()
    loops().transpose(matrix.contiguous().view(kind).numpy(), made.view(kind).numpy())
    return made


def numbers(like: Tensor, *values: int | float) -> Iterator[Any]:
    """Python's numbers in the dtype of a tensor, as a compiled loop wants them."""
    kind = np.float64 if like.dtype == torch.float64 else np.float32
    return map(kind, values)


@cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """One for each process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, "optq")
