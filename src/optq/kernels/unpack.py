"""What Numba compiles for :mod:`.cpu_blocks`: packed 4-bit codes become a blocked bfloat16 weight.

The step of the innermost loop is written in vectors of 16, with LLVM's instructions: left to find
vectors by itself, LLVM takes twice as long.

It is threaded by Numba itself, whose OpenMP is torch's own: threads of Python would compete with
those of torch, which wait for the next operation without sleep.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import prange
from numba.core import cgutils, types
from numba.extending import intrinsic

from optq.core.compiled import in_threads, use_threads

HALF = 32  # rows whose codes lie in the low bits of a tile's bytes; as many lie in the high bits
LIFT = np.float32(2**23)  # whose last bits as a float32 are an integer's
LIFTED = 0x4B000000  # the same, its bits
SHORT = np.uint32(16)
AHEAD = 2**11  # bytes of codes that are asked for before their turn
BYTE, WORD, REAL = ir.IntType(8), ir.IntType(32), ir.FloatType()


class _Bfloat(ir.Type):
    def _to_string(self) -> str:
        return "bfloat"


@no_type_check
def vector(kind, length=16):
    return ir.VectorType(kind, length)


@no_type_check
def every(value):
    return ir.Constant(vector(WORD), [value] * 16)


@no_type_check
def rounded(build, bits):
    """Bits of float32, half to even to those of bfloat16; their last 16 are left over."""
    odd = build.and_(build.lshr(bits, every(16)), every(1))
    return build.add(build.add(bits, odd), every(0x7FFF))


@no_type_check
def _words(build, low, high):
    """Float32 vectors, rounded half to even to bfloat16, in the two halves of words."""

    low, high = (rounded(build, build.bitcast(each, vector(WORD))) for each in (low, high))
    return build.or_(build.lshr(low, every(16)), build.and_(high, every(0xFFFF0000)))


@no_type_check
def _words_natively(build, low, high):
    """The same, of processors that have an instruction for it; it knows no subnormal numbers."""
    both = vector(_Bfloat(), 32)
    kind = ir.FunctionType(both, [vector(REAL)] * 2)
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    function = cgutils.get_or_insert_function(build.module, kind, name)
    halves = build.bitcast(build.call(function, [high, low]), vector(ir.IntType(16), 32))
    order = [place // 2 + place % 2 * 16 for place in range(32)]
    mixed = build.shuffle_vector(halves, halves, ir.Constant(vector(WORD, 32), order))
    return build.bitcast(mixed, vector(WORD))


@no_type_check
def fetch(build, address):
    """Into the first cache: the processor itself looks ahead no further than a page."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(BYTE), WORD, WORD, WORD])
    function = cgutils.get_or_insert_function(build.module, kind, "llvm.prefetch.p0i8")
    build.call(function, [address, *(ir.Constant(WORD, each) for each in (0, 3, 1))])


@intrinsic
@no_type_check
def weave(_, one, two, more, most, zero, unit, low, high):
    """Two neighbouring columns of a tile, ``one`` and ``two`` ``[32]``, to words ``[32]`` of pairs:
    its first rows to ``low``, its last to ``high``.

    ``more`` and ``most`` are the high halves of 8 bits, or None. A pair is two times
    ``(code - zero) * unit``, exact in float32 and rounded half to even to bfloat16, ``one`` in the
    low bits. ``zero`` and ``unit`` are ``[64]``, ``zero`` above 2^23, as the code is made to be.
    """
    given = (one, two, more, most, zero, unit, low, high)

    def step(context, build, signature, arguments):
        one, two, more, most, zero, unit, low, high = (
            None if kind is types.none else context.make_array(kind)(context, build, each).data
            for kind, each in zip(signature.args, arguments, strict=True)
        )

        def place(array, start, kind):
            there = build.gep(array, [ir.Constant(ir.IntType(64), start)])
            return build.bitcast(there, ir.PointerType(vector(kind)))

        def load(array, start, kind):
            return build.load(place(array, start, kind), align=1)

        def codes(array, start):
            return None if array is None else build.zext(load(array, start, BYTE), vector(WORD))

        def value(code, zero, unit):
            code = build.bitcast(build.or_(code, every(LIFTED)), vector(REAL))
            return build.fmul(build.fsub(code, zero), unit)

        # Before LLVM 16 the instruction gave integers.
        native = "+avx512bf16" in context.codegen().magic_tuple()[2] and llvm_version_info[0] > 15
        words = _words_natively if native else _words
        for array in (one, more):
            if array is not None:
                fetch(build, build.gep(array, [ir.Constant(ir.IntType(64), AHEAD)]))
        for start in range(0, HALF, 16):
            columns = [(codes(a, start), codes(b, start)) for a, b in ((one, more), (two, most))]
            for half, target in enumerate((low, high)):
                own = start + half * HALF
                grid = load(zero, own, REAL), load(unit, own, REAL)
                pair = []
                for code, upper in columns:
                    code = build.lshr(code, every(4)) if half else build.and_(code, every(15))
                    if upper is not None:
                        upper = upper if half else build.shl(upper, every(4))
                        code = build.or_(code, build.and_(upper, every(240)))
                    pair.append(value(code, *grid))
                build.store(words(build, *pair), place(target, start, WORD), align=1)
        return context.get_dummy_value()

    return types.void(*given), step


@in_threads
@no_type_check
def _unpack(codes, more, units, zeros, lift, first, halves, weight):
    """Tiles from ``first`` into ``weight``, as many as that holds.

    ``codes [tiles, cols, 32]``, of 8 bits the low ones, and ``more`` the high ones or None;
    ``units [groups, rows, 2]`` whose ``[..., 0]`` are bfloat16's bits; ``zeros [its groups, rows]``
    with as many rows and as many or fewer groups; ``lift`` what codes were raised by. ``weight``
    is ``[tiles, lines, 32]``, words of pairs: 64 rows of a pair of columns are two lines, which
    alternate, or where ``halves`` the second of each is behind all first ones.
    """
    groups, pairs = units.shape[0], codes.shape[1] // 2
    width, shared = pairs // groups, groups // zeros.shape[0]
    step, side = (1, pairs) if halves else (2, 1)
    for job in prange(weight.shape[0] * groups):
        place, group = job // groups, job % groups
        tile = first + place
        unit, zero = np.empty(2 * HALF, np.float32), np.empty(2 * HALF, np.float32)
        for r in range(2 * HALF):
            row = tile * 2 * HALF + r
            unit[r] = np.uint32(np.uint32(units[group, row, 0]) << SHORT).view(np.float32)
            zero[r] = LIFT + np.float32(zeros[group // shared, row] + lift)
        for pair in range(group * width, (group + 1) * width):
            i, j, line = 2 * pair, 2 * pair + 1, pair * step
            one, two = codes[tile, i], codes[tile, j]
            low, high = weight[place, line], weight[place, line + side]
            if more is None:
                weave(one, two, None, None, zero, unit, low, high)
            else:
                weave(one, two, more[tile, i], more[tile, j], zero, unit, low, high)


def unpack(*arguments: Any) -> None:
    """:func:`_unpack` in as many threads as torch has."""
    use_threads()
    _unpack(*arguments)
