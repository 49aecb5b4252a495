"""What Numba compiles for processors with AMX: activations times packed 4-bit codes.

AMX multiplies tiles of 16 rows of activations and 16 of a weight, 32 columns each, with float32
sums, in the time of a few vector operations. The weight's tiles are unpacked (:mod:`.unpack`) into
the nearest caches a few at a time, and used for all activations before the next. The instructions
are LLVM's ``llvm.x86.tileloadd64`` and others, with the processor's eight tiles named: 0 to 3 hold
sums, 4 and 5 activations, 6 and 7 a weight.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numpy as np
import torch
from llvmlite import ir
from numba import prange
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from optq.core.compiled import in_threads, use_threads
from optq.kernels.unpack import (
    HALF,
    LIFT,
    SHORT,
    WORD,
    every,
    fetch,
    rounded,
    vector,
    weave,
)

ROWS, PAIR = 16, 32  # of activations in a tile, and in the two that are multiplied at a time
MOST = 256  # rows of activations; beyond, oneDNN's product of blocks is faster
BESIDE = 8  # tiles of codes at most
TILE = 64  # rows of packed codes, four tiles of a weight
STEP = 32  # columns in a tile
STEPS = 16  # tiles in a row that are unpacked at a time: twice 32 KB
BYTE, SHORTER, PLACE = ir.IntType(8), ir.IntType(16), ir.IntType(64)
# Numba keeps what it compiled until this file changes; what is from the other one is in there, too.
UNPACK = "071dbb63375f9fec"
CONFIG = np.zeros(64, np.uint8)  # eight tiles of 16 rows of 64 bytes
CONFIG[0], CONFIG[48:56] = 1, 16
CONFIG[16:32].view(np.uint16)[:] = 64


def serves() -> bool:
    """Whether processor and compiler have AMX and the kernel of the system allows it."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    allowed = getattr(torch.cpu, "_init_amx", lambda: False)
    return {"+amx-tile", "+amx-bf16"} <= set(features) and allowed()


@no_type_check
def _bytes(context, build, kind, array, start=0):
    """The address of an array's byte ``start``."""
    first = build.bitcast(context.make_array(kind)(context, build, array).data, BYTE.as_pointer())
    start = ir.Constant(PLACE, start) if isinstance(start, int) else start
    return build.gep(first, [start])


@no_type_check
def _do(build, name, *values):
    """An instruction; tiles' numbers are constants."""
    values = [ir.Constant(BYTE, each) if isinstance(each, int) else each for each in values]
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in values])
    build.call(cgutils.get_or_insert_function(build.module, kind, f"llvm.x86.{name}"), values)


@intrinsic
@no_type_check
def _configure(_, config, before):
    """Set the tiles' shapes; what they were goes to ``before``: oneDNN relies on its own."""

    def step(context, build, signature, arguments):
        _do(build, "sttilecfg", _bytes(context, build, before, arguments[1]))
        _do(build, "ldtilecfg", _bytes(context, build, config, arguments[0]))
        return context.get_dummy_value()

    return types.void(config, before), step


@intrinsic
@no_type_check
def _restore(_, before):
    def step(context, build, signature, arguments):
        _do(build, "ldtilecfg", _bytes(context, build, before, arguments[0]))
        return context.get_dummy_value()

    return types.void(before), step


@no_type_check
def _sums(name):
    """Between the tiles of sums and float32 ``[32, 64]`` from byte ``start``: two by two tiles."""

    @intrinsic
    def move(_, sums, start):
        def step(context, build, signature, arguments):
            for tile in range(4):
                place = tile // 2 * 4 * TILE * ROWS + tile % 2 * 64
                place = build.add(arguments[1], ir.Constant(PLACE, place))
                place = _bytes(context, build, sums, arguments[0], place)
                _do(build, name, tile, place, ir.Constant(PLACE, 4 * TILE))
            return context.get_dummy_value()

        return types.void(sums, types.int64), step

    return move


_load, _store = _sums("tileloadd64"), _sums("tilestored64")


@intrinsic
@no_type_check
def _add(_, x, y, words):
    """Add to the sums: two tiles of activations, ``x`` and ``y [16, 32]``, times 32 rows of a
    weight, ``words [16, 32]``, pairs of columns.
    """

    def step(context, build, signature, arguments):
        near, line = ir.Constant(PLACE, 2 * STEP), ir.Constant(PLACE, 4 * HALF)
        for tile in range(2):
            kind, own = signature.args[tile], arguments[tile]
            _do(build, "tileloadd64", 4 + tile, _bytes(context, build, kind, own), near)
            own = _bytes(context, build, words, arguments[2], 64 * tile)
            _do(build, "tileloadd64", 6 + tile, own, line)
        for tile in range(4):
            _do(build, "tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)
        return context.get_dummy_value()

    return types.void(x, y, words), step


@intrinsic
@no_type_check
def _ahead(_, units, zeros):
    """Ask for a tile's grid, of the group that comes next."""

    def step(context, build, signature, arguments):
        for line in range(4):
            fetch(build, _bytes(context, build, units, arguments[0], 64 * line))
        fetch(build, _bytes(context, build, zeros, arguments[1]))
        return context.get_dummy_value()

    return types.void(units, zeros), step


@intrinsic
@no_type_check
def _round(_, sums, y):
    """Float32 ``[64]``, rounded half to even, to bfloat16's bits ``[64]``."""

    def step(context, build, signature, arguments):
        for start in range(0, TILE, 16):
            place = _bytes(context, build, sums, arguments[0], 4 * start)
            bits = build.load(build.bitcast(place, vector(WORD).as_pointer()), align=4)
            short = build.trunc(build.lshr(rounded(build, bits), every(16)), vector(SHORTER))
            place = _bytes(context, build, y, arguments[1], 2 * start)
            build.store(short, build.bitcast(place, vector(SHORTER).as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(sums, y), step


@in_threads
@no_type_check
def _multiply(codes, more, units, zeros, lift, given, beside, config, y):
    """``given [tokens, cols]`` times the weight into ``y [tokens and what fills two tiles, rows]``,
    both bfloat16's bits. The weight is as in :func:`.unpack._unpack`. ``beside`` tiles of codes
    are taken at a time, between which activations stay in the cache.
    """
    tokens, cols = len(y), given.shape[1]
    x = np.empty((tokens // ROWS, cols // STEP, ROWS, STEP), np.uint16)  # each tile in one place
    for group in prange(tokens // ROWS):
        for row in range(ROWS):
            token = min(group * ROWS + row, len(given) - 1)  # the last fills what is left over
            for step in range(cols // STEP):
                x[group, step, row] = given[token, step * STEP : (step + 1) * STEP]
    groups, tiles = units.shape[0], codes.shape[0]
    width, shared = cols // groups, groups // zeros.shape[0]
    for job in prange((tiles + beside - 1) // beside):
        first = job * beside
        count = min(beside, tiles - first)
        before = np.empty(64, np.uint8)
        unit, zero = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        words = np.empty((STEPS, 2, 16, HALF), np.uint32)
        sums = np.zeros((count, tokens // ROWS, ROWS, TILE), np.float32)
        _configure(config, before)
        for left in range(0, cols, STEPS * STEP):
            steps = min(STEPS, (cols - left) // STEP)
            for place in range(count):
                tile, known = first + place, -1
                for step in range(steps):
                    column = left + step * STEP
                    group = column // width
                    if group != known:
                        known = group
                        after = min(group + 1, groups - 1)
                        _ahead(units[after, tile * TILE], zeros[after // shared, tile * TILE :])
                        for r in range(TILE):
                            bits = np.uint32(units[group, tile * TILE + r, 0])
                            unit[r] = np.uint32(bits << SHORT).view(np.float32)
                            zero[r] = LIFT + np.float32(
                                zeros[group // shared, tile * TILE + r] + lift
                            )
                    block = words[step]
                    for pair in range(16):
                        i, j = column + 2 * pair, column + 2 * pair + 1
                        one, two = codes[tile, i], codes[tile, j]
                        low, high = block[0, pair], block[1, pair]
                        if more is None:
                            weave(one, two, None, None, zero, unit, low, high)
                        else:
                            weave(one, two, more[tile, i], more[tile, j], zero, unit, low, high)
                for half in range(2):
                    for group in range(0, tokens // ROWS, 2):
                        own = sums[place, group]
                        _load(own, 4 * HALF * half)
                        for step in range(steps):
                            at = left // STEP + step
                            _add(x[group, at], x[group + 1, at], words[step, half])
                        _store(own, 4 * HALF * half)
        _restore(before)
        for place in range(count):
            start = (first + place) * TILE
            for token in range(tokens):
                source = sums[place, token // ROWS, token % ROWS]
                _round(source, y[token, start : start + TILE])


def multiply(arrays: tuple[Any, ...], lift: int, x: Tensor) -> Tensor:
    """``x @ W.T`` for bfloat16 ``x [tokens, cols]``, up to ``MOST``: ``[tokens, rows]``.

    ``arrays`` are ``codes``, ``more``, ``units`` and ``zeros`` of :func:`.unpack._unpack`.
    """
    tokens, tiles = len(x), len(arrays[0])
    y = x.new_empty(tokens + -tokens % PAIR, tiles * TILE)
    use_threads()
    beside = min(tokens // 64 + 1, BESIDE, -(-tiles // (2 * torch.get_num_threads())))
    _multiply(*arrays, lift, _bits(x), beside, CONFIG, _bits(y))
    return y[:tokens]


def _bits(tensor: Tensor) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = tensor.view(torch.int16).numpy().view(np.uint16)
    return bits
