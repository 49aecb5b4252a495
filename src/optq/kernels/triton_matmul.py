"""Many rows of activations times a packed weight on the tensor cores; and dequantizing alone.

``y.T = W @ x.T``: the weights are the left operand, which tensor cores may read from registers, so
that a weight goes from its word to the product without a trip through shared memory; the
activations, few, are the right one. Each field of a tile of words is 16 columns deep: one step of
the tensor cores, in which all columns share a group, so a scale is one vector over the rows.

Where tiles of rows do not fill the chip, programs share the columns (``SPLITS``): each writes its
float32 part to a workspace, and one sum over it, always in the same order, gives the result. (No
atomics: their order, and so the bits, would change from run to run.)

Accuracy: the weights are rounded to the activations' dtype, as dequantizing does; sums are
float32 (a float32 product is exact float32, not TF32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from optq.kernels.triton_codes import (
    dot,
    field_words,
    group_of,
    lifted_code,
    low_words,
    offset,
    rounded,
)

if triton.knobs.runtime.interpret:  # nothing to time
    CONFIGS = [triton.Config({"ROWS": 64})]
else:
    # One warp keeps its weights in their threads; four and eight share the activations.
    CONFIGS = [
        triton.Config({"ROWS": rows}, num_warps=warps, num_stages=3)
        for rows, warps in [(32, 1), (64, 4), (128, 8)]
    ]


@triton.jit
def field_weights(words, place: tl.constexpr, wbits: tl.constexpr, scale, zero, one, sixteen):
    """``(c - z) s`` in float32 for one field, from ``16 s`` and ``z``, ``[ROWS]`` or scalar."""
    shift = (offset(place, wbits) + zero / 16) * scale
    return lifted_code(words, place, wbits, one, sixteen) * scale[:, None] - shift[:, None]


@triton.jit
def fragment_columns(words, ROWS: tl.constexpr):
    """Words ``[ROWS, 16]`` with columns in :func:`fragment_rows`'s order."""
    return words.reshape(ROWS, 4, 2, 2).permute(0, 2, 1, 3).reshape(ROWS, 16)


@triton.jit
def fragment_rows(activations, TOKENS: tl.constexpr):
    """Activations ``[16, TOKENS]`` in the order in which tensor cores take what threads hold.

    A product may sum over its columns in any order. Thread ``t`` of four has loaded columns
    ``4 t .. 4 t + 3`` of the words, and as operand is to hold ``2 t, 2 t + 1, 2 t + 8, 2 t + 9``:
    renaming the columns, alike on both sides, spares each weight a trip to another thread.
    """
    return activations.reshape(4, 2, 2, TOKENS).permute(1, 0, 2, 3).reshape(16, TOKENS)


@triton.autotune(CONFIGS, key=["rows", "cols", "wbits", "TOKENS", "SPLITS", "RUN"])
@triton.jit
def matmul_kernel(
    x,
    low,
    high,
    scales,
    zeros,
    y,
    tokens,
    rows,
    cols,
    groups,
    width,
    one,
    sixteen,
    periods: tl.constexpr,
    wbits: tl.constexpr,
    sym: tl.constexpr,
    HALVES: tl.constexpr,
    PARTS: tl.constexpr,
    PLACES: tl.constexpr,
    RUN: tl.constexpr,  # slices that surely share a group
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``y [SPLITS, tokens, rows]``: parts of ``x [tokens, cols] @ W.T``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, 16)
    row_inside = row < rows
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    share: tl.constexpr = (periods + SPLITS - 1) // SPLITS
    for step in tl.range(0, share):
        period = tl.program_id(2) * share + step
        unit = (row * periods + period)[:, None]
        known_rows = row_inside & (period < periods)
        inside = known_rows[:, None]
        tail = lane[None, :]
        top = tl.load(high + unit * 16 + tail, mask=inside, other=0) if wbits == 3 else 0
        for half in tl.static_range(HALVES):
            bottom = low_words(low, unit, tail, inside, half, wbits)
            for part in tl.static_range(PARTS):
                words = field_words(bottom, top, half, part, wbits)
                words = fragment_columns(words, ROWS)
                for first in tl.static_range(0, PLACES, RUN):
                    base = (period * (HALVES * PARTS) + half * PARTS + part) * PLACES + first
                    group = group_of(row, base, groups, width)
                    scale = tl.load(scales + group, mask=known_rows, other=0).to(tl.float32) * 16
                    if sym:
                        zero = 2.0 ** (wbits - 1)
                    else:
                        zero = tl.load(zeros + group, mask=known_rows, other=0).to(tl.float32)
                    for place in tl.static_range(first, first + RUN):
                        column = (base + place - first) * 16 + lane
                        at = token[None, :] * cols + column[:, None]
                        known = (token[None, :] < tokens) & (column[:, None] < cols)
                        right = tl.load(x + at, mask=known, other=0)
                        right = fragment_rows(right, TOKENS)
                        left = field_weights(words, place, wbits, scale, zero, one, sixteen)
                        left = rounded(left, x.dtype.element_ty)
                        sums = dot(left, right, sums)
    at = (tl.program_id(2) * tokens + token[None, :]).to(tl.int64) * rows + row[:, None]
    known = (token[None, :] < tokens) & row_inside[:, None]
    tl.store(y + at, rounded(sums, y.dtype.element_ty), mask=known)


@triton.jit
def dequantize_kernel(
    low,
    high,
    scales,
    zeros,
    weight,
    rows,
    cols,
    groups,
    width,
    one,
    sixteen,
    periods: tl.constexpr,
    wbits: tl.constexpr,
    sym: tl.constexpr,
    HALVES: tl.constexpr,
    PARTS: tl.constexpr,
    PLACES: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``weight [rows, cols]`` in its own dtype, each value rounded once; a period to a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    period = tl.program_id(1)
    lane = tl.arange(0, 16)
    row_inside = row < rows
    unit = (row * periods + period)[:, None]
    inside = row_inside[:, None]
    tail = lane[None, :]
    top = tl.load(high + unit * 16 + tail, mask=inside, other=0) if wbits == 3 else 0
    for half in tl.static_range(HALVES):
        bottom = low_words(low, unit, tail, inside, half, wbits)
        for part in tl.static_range(PARTS):
            words = field_words(bottom, top, half, part, wbits)
            for place in tl.static_range(PLACES):
                base = (period * (HALVES * PARTS) + half * PARTS + part) * PLACES + place
                group = group_of(row, base, groups, width)
                scale = tl.load(scales + group, mask=row_inside, other=0).to(tl.float32) * 16
                if sym:
                    zero = 2.0 ** (wbits - 1)
                else:
                    zero = tl.load(zeros + group, mask=row_inside, other=0).to(tl.float32)
                values = field_weights(words, place, wbits, scale, zero, one, sixteen)
                column = base * 16 + lane
                known = inside & (column[None, :] < cols)
                at = row[:, None] * cols + column[None, :]
                tl.store(weight + at, rounded(values, weight.dtype.element_ty), mask=known)
