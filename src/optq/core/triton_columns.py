"""The column loop of the sweep on an NVIDIA GPU, as one launch for a block of columns.

Written as operations on tensors, each column is about ten launches that wait for each other. Here
one program takes ``ROWS`` rows of one weight through the whole block: their ``W^`` is a tile in
registers, ``[COLUMNS, ROWS]``. A column is taken out of it as a sum over the columns of which all
others are masked, for registers have no index, and its error is added to the columns ahead as the
tile's outer product. Programs of several weights, each with a factor of its own, run side by side.

A tile has one warp, so that neither sum nor product waits for another one: its 32 threads lie 8 by
4, and a column's sum is over the 16 registers of a thread and two exchanges.

The arithmetic is that of :meth:`optq.core.sweep.Sweep._one_by_one`, in float32; sums of another
order can put a weight on the other side of a rounding boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from optq.core.problem import Factor

ROWS = 32  # with a block of 64 columns, half of a thread's 127 registers hold the tile
# A float32 of that size has no bits after the point: adding it rounds to integers, ties to even.
INTEGERS = tl.constexpr(1.5 * 2**23)


@triton.jit(do_not_specialize=["start"])
@no_type_check  # Triton's language, not Python's types
def column_kernel(
    W_hat,
    W,
    codes,
    scale,
    zero,
    group,
    N,
    squares,
    residual,
    start,
    rows,
    across,
    levels,
    count: tl.constexpr,  # few values: the interpreter takes no other bound of a loop
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``count`` columns from ``start``; tensors are ``[cols, across]``, but ``N`` and ``squares``,
    of the block alone, are ``[weights, count, ...]``."""
    weight = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row = (weight * rows + row).to(tl.int64)
    N += weight * count * count
    squares += weight * count
    at = tl.arange(0, COLUMNS)
    here = (start + at).to(tl.int64)[:, None] * across + row[None, :]
    tile = tl.load(W_hat + here, mask=(at < count)[:, None] & inside[None, :], other=0)
    total = tl.zeros([ROWS], tl.float32)
    for j in tl.range(count):
        w_hat = tl.sum(tl.where((at == j)[:, None], tile, 0), 0)
        grid = tl.load(group + start + j).to(tl.int64) * across + row
        s = tl.load(scale + grid, mask=inside, other=1)
        z = tl.load(zero + grid, mask=inside, other=0)
        # Limits are integers: it is the same whether a weight meets them before it is rounded.
        units = tl.minimum(tl.maximum(tl.div_rn(w_hat, s), -z), levels - z)
        units = (units + INTEGERS) - INTEGERS
        place = (start + j).to(tl.int64) * across + row
        tl.store(codes + place, (units + z).to(tl.uint8), mask=inside)
        miss = w_hat - units * s
        total += tl.load(squares + j) * miss * miss
        error = tl.load(W + place, mask=inside, other=0) - units * s
        tl.store(W + place, error, mask=inside)
        ahead = (at > j) & (at < count)
        spread = tl.load(N + j * count + at, mask=ahead, other=0)
        tile += spread[:, None] * error[None, :]
    before = tl.load(residual + row, mask=inside, other=0)
    tl.store(residual + row, before + total, mask=inside)


def column_loop(
    columns: slice,
    factors: Sequence[Factor],
    group: Int[Tensor, " cols"],
    levels: int,
    W_hat: Float[Tensor, "cols across"],
    W: Float[Tensor, "cols across"],
    codes: UInt8[Tensor, "cols across"],
    scale: Float[Tensor, "groups across"],
    zero: Float[Tensor, "groups across"],
    residual: Float[Tensor, " across"],
) -> None:
    """Quantize ``columns``, a block, of weights that stand side by side in ``across``.

    ``W`` becomes the errors, ``codes`` are filled in, and ``residual`` grows by
    ``U_jj^2 (w^_j - q_j)^2``; ``W_hat`` stays. ``levels`` is the largest code.
    """
    count, across = columns.stop - columns.start, W.shape[1]
    N = torch.stack([factor.N[columns, columns] for factor in factors])
    squares = torch.stack([factor.squares[columns] for factor in factors])
    rows = across // len(factors)
    tensors = (W_hat, W, codes, scale, zero)
    if not all(each.is_contiguous() for each in tensors):
        raise ValueError("the sweep's tensors must be contiguous")
    with torch.cuda.device_of(W):  # Triton launches on the current one
        column_kernel[(triton.cdiv(rows, ROWS), len(factors))](
            *tensors, group, N, squares, residual, columns.start, rows, across, levels, count=count,
            COLUMNS=max(16, triton.next_power_of_2(count)), ROWS=ROWS, num_warps=1,
        )  # fmt: skip
