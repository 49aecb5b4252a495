"""From packed words to floating-point codes, inside a Triton kernel (layout: triton_layout.py).

A code becomes a float without a conversion: its bits go to the top of the mantissa of 1.0 or
16.0, which gives ``offset + c / 16`` exactly, ``offset`` being 1 or 16. Two 4-bit fields that are
neighbours land on their two places with ONE shift, the upper below the exponent of 1.0, the lower
four bits further down below that of 16.0; so a code costs half a shift and one mask-and-set (one
LOP3 on NVIDIA). A conversion would cost two more instructions at half rate, and a batch of one at
4 bits leaves about 3.7 instructions for a weight at an H200's bandwidth.

    (c - z) s = (offset + c / 16) 16 s - (16 offset + z) s

is exact in float32 for scales of at most 12 significant bits (float16, bfloat16), fused or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The bits of 1.0 and 16.0. A launch passes them as arguments: as constants they would be the
# second immediate operand of each mask-and-set, which then takes two instructions.
EXPONENTS = (0x3F800000, 0x41800000)

# Triton's interpreter (version 3.6) truncates to bfloat16, and multiplies its bits as integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def low_words(low, unit, lane, mask, half: tl.constexpr, wbits: tl.constexpr):
    """16 words of a period; ``unit = row * periods + period``, of any shape, with ``lane``."""
    if wbits == 3:
        return tl.load(low + (unit * 2 + half) * 16 + lane, mask=mask, other=0)
    else:
        return tl.load(low + unit * 16 + lane, mask=mask, other=0)


@triton.jit
def field_words(low, high, half: tl.constexpr, part: tl.constexpr, wbits: tl.constexpr):
    """Words whose fields (8 bits at 8, else 4) hold one code each, in the lowest bits."""
    if wbits == 3:
        third: tl.constexpr = half * 2 + part  # the bit of each field of `high`
        lifted = (high << (2 - third)) if third < 2 else (high >> (third - 2))
        return ((low >> (2 * part)) & 0x33333333) | (lifted & 0x44444444)
    elif wbits == 2:
        return low >> (2 * part)
    else:
        return low


@triton.jit
def lifted_code(words, place: tl.constexpr, wbits: tl.constexpr, one, sixteen):
    """``offset(place) + c / 16`` in float32, ``c`` the code in field ``place``."""
    if wbits == 8:
        shift: tl.constexpr = 8 * place - 15
    else:
        shift: tl.constexpr = 8 * (place // 2) - 15
    moved = (words >> shift) if shift > 0 else (words << -shift)
    if wbits != 8 and place % 2 == 1:
        lifted = (moved & ((2**wbits - 1) << 19)) | one
    else:
        lifted = (moved & ((2**wbits - 1) << 15)) | sixteen
    return lifted.to(tl.float32, bitcast=True)


@triton.constexpr_function
def offset(place, wbits):
    """What :func:`lifted_code` adds to the code's sixteenth."""
    return 1.0 if wbits != 8 and place % 2 == 1 else 16.0


@triton.jit
def group_of(row, slices, groups, width):
    """Index of the grids of slice ``slices`` of ``row``; padding takes the last group's."""
    return row * groups + tl.minimum(slices * 16 // width, groups - 1)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values to the nearest of ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        return values.to(dtype)


@triton.jit
def dot(left, right, sums):
    """``sums + left @ right``, float32 sums."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")
