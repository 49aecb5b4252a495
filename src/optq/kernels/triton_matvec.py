"""A few rows of activations times a packed weight, on the ordinary (not tensor) cores.

One program takes ``ROWS`` rows and all columns. Its threads and warps lie side by side along the
columns, so each thread has ``ROWS`` independent 16-byte loads under way and uses an activation for
``ROWS`` weights, and the columns are split over the warps, whose sums meet once, in a fixed order,
at the end: no workspace, no second kernel, no atomics, the same bits every time. With 4 rows to a
program 528 rows fill 132 multiprocessors. (The periods are the first axis of each tile, because
Triton lays threads along the first of two axes that are equally far from contiguous.)

The sums are of the lifted codes of triton_codes.py: one multiply-add to a weight and to a row of
activations. What lifting added is taken out once a run of slices of one group, by starting there
from ``-sum (offset + z / 16) x`` instead of 0.

Accuracy: float32 throughout, the result rounded once to the activations' dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optq.kernels.triton_codes import field_words, group_of, lifted_code, low_words, offset, rounded

if triton.knobs.runtime.interpret:  # nothing to time
    CONFIGS = [triton.Config({"ROWS": 32, "PERIODS": 2})]
else:
    # Eight periods to a warp: one for each four threads, which read a row's 64 bytes.
    CONFIGS = [
        triton.Config({"ROWS": rows, "PERIODS": 8 * warps}, num_warps=warps)
        for rows, warps in [(2, 4), (4, 4), (8, 4), (4, 2)]
    ]


@triton.jit
def run(
    x,
    words,
    column,
    cols,
    zero,
    one,
    sixteen,
    first: tl.constexpr,
    RUN: tl.constexpr,
    wbits: tl.constexpr,
    sym: tl.constexpr,
):
    """``sum (c - z) / 16 * x`` over ``RUN`` slices from ``first``, which share a group.

    ``zero`` is ``z / 16``, ``[PERIODS, ROWS, 1]``; where ``sym``, one number for all.
    """
    plain = tl.zeros(column.shape, tl.float32)
    lifted = tl.zeros(column.shape, tl.float32)
    for place in tl.static_range(first, first + RUN):
        at = column + (place - first) * 16
        value = tl.load(x + at, mask=at < cols, other=0).to(tl.float32)
        if sym:
            lifted += value * (offset(place, wbits) + zero)
        else:
            lifted += value * offset(place, wbits)
            plain += value
    products = -lifted[:, None] if sym else -(lifted[:, None] + zero * plain[:, None])
    for place in tl.static_range(first, first + RUN):
        at = column + (place - first) * 16
        value = tl.load(x + at, mask=at < cols, other=0).to(tl.float32)
        products += lifted_code(words, place, wbits, one, sixteen) * value[:, None]
    return products


@triton.autotune(CONFIGS, key=["rows", "cols", "wbits", "TOKENS", "RUN"])
@triton.jit
def matvec_kernel(
    x,
    low,
    high,
    scales,
    zeros,
    y,
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
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PERIODS: tl.constexpr,
):
    """``y [TOKENS, rows] = x [TOKENS, cols] @ W.T``; ``width`` columns to a group."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, 16)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros((PERIODS, ROWS, 16), tl.float32),)
    for start in tl.range(0, periods, PERIODS):
        period = start + tl.arange(0, PERIODS)
        inside = (period[:, None] < periods) & (row[None, :] < rows)
        words_inside = inside[:, :, None]
        unit = (row[None, :] * periods + period[:, None])[:, :, None]
        tail = lane[None, None, :]
        top = tl.load(high + unit * 16 + tail, mask=words_inside, other=0) if wbits == 3 else 0
        for half in tl.static_range(HALVES):
            bottom = low_words(low, unit, tail, words_inside, half, wbits)
            for part in tl.static_range(PARTS):
                words = field_words(bottom, top, half, part, wbits)
                for first in tl.static_range(0, PLACES, RUN):
                    base = (period * (HALVES * PARTS) + half * PARTS + part) * PLACES + first
                    group = group_of(row[None, :], base[:, None], groups, width)
                    scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32) * 16
                    if sym:
                        zero = 2.0 ** (wbits - 5)
                    else:
                        zero = tl.load(zeros + group, mask=inside, other=0).to(tl.float32) / 16
                        zero = zero[:, :, None]
                    column = base[:, None] * 16 + lane[None, :]
                    new = ()
                    for token in tl.static_range(TOKENS):
                        products = run(
                            x + token * cols,
                            words,
                            column,
                            cols,
                            zero,
                            one,
                            sixteen,
                            first,
                            RUN,
                            wbits,
                            sym,
                        )
                        new += (sums[token] + scale[:, :, None] * products,)
                    sums = new
    for token in tl.static_range(TOKENS):
        result = tl.sum(tl.sum(sums[token], 2), 0)
        tl.store(y + token * rows + row, rounded(result, y.dtype.element_ty), mask=row < rows)
