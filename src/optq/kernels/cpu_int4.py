"""CPU: PyTorch's own product with packed 4-bit codes, ``_weight_int4pack_mm_for_cpu``.

It computes ``x @ W.T`` for ``W = (c - 8) * scale + offset`` with one ``(scale, offset)`` to each
group of 32, 64, 128 or 256 columns of a row, and is fast with bfloat16 activations only: others
are cast for it. So:

* a zero point becomes ``offset = (8 - z) * scale``, and 2 and 3 bits are the middle codes of 4;
* wider groups are cut into such groups, with the scale repeated;
* 8 bits are two products: ``c = 16 * high + low``;
* columns are put in the order of their groups once, and activations follow at each call;
* rows are padded to whole tiles, columns to whole groups.

It reads a quarter of a bfloat16 weight's bytes, so it wins while reading is what takes time. Its
time grows with every row of activations, for it unpacks the weight again for every few. Past
:func:`few` rows bfloat16 activations are multiplied by a weight that is unpacked once, a part at a
time: with AMX and up to 256 rows in a loop of its own (:mod:`.amx`), else by oneDNN
(:mod:`.cpu_blocks`). Where that cannot be had, and for other dtypes, past ``FEW`` rows the weight
is dequantized by torch's operations and multiplied in the activations' dtype (float16: in
float32).

Accuracy of the packed product: activations, scales, offsets and the result are rounded to
bfloat16 (2^-9 each), sums are float32. Of the others: scales and weights are rounded to the dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from optq.core.weight import QuantizedWeight
from optq.kernels import cpu_blocks
from optq.kernels.product import Product, compact

FEWEST = 4  # rows of activations that are always multiplied packed
FEW = 96  # rows of activations: where packed and dense take equally long (bench/kernels.py)
GROUPS = (256, 128, 64, 32)  # that the operator takes
TILE = 64  # rows; a multiple of each processor's
CHUNK = 512  # rows that are dequantized at a time: they stay in the cache


def takes(weight: QuantizedWeight) -> bool:
    """Whether its groups, in order, can be cut into groups that the operator takes."""
    if weight.groups == 1:
        return True
    sizes = torch.bincount(weight.g_idx, minlength=weight.groups)
    return weight.width % GROUPS[-1] == 0 and bool((sizes == weight.width).all())


@cache
def few() -> int:
    """Rows of activations past which unpacking once is faster (bench/kernels.py).

    AMX multiplies 16 rows in the time of one; without it every row costs its time either way.
    """
    if _tile() != cpu_blocks.TILE:  # packed in another way
        return FEW
    return FEWEST if cpu_blocks.tiles() is not None else 24


class Int4Product(Product):
    """Holds for each half (8 bits have two) packed codes and grids ``[groups, rows, 2]``."""

    order: Tensor | None
    scales: Tensor
    zeros: Tensor
    codes0: Tensor
    grid0: Tensor
    codes1: Tensor
    grid1: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight.rows, weight.cols, dtype)
        weight, order = weight.sorted()
        self.keep("order", order)
        padded = weight.cols + -weight.cols % GROUPS[-1]
        group = padded if weight.groups == 1 else weight.width
        self.width = next(size for size in GROUPS if group % size == 0)
        self.halves = 2 if weight.wbits == 8 else 1
        filler = -weight.rows % TILE
        codes = pad(weight.codes.T, (0, filler, 0, padded - weight.cols)).contiguous().T
        scale = pad(weight.scales, (0, 0, 0, filler))
        zeros = pad(weight.zeros, (0, 0, 0, filler))
        # For the dense product, scales as stored; [groups, rows], zeros of whole tiles.
        self.keep("scales", compact(weight.scales.T.contiguous()))
        self.keep("zeros", zeros.T.contiguous())
        zero = zeros.to(scale.dtype)
        if self.halves == 1:  # few bits in the middle of the operator's range
            self.lift = 8 - 2 ** (weight.wbits - 1)
            parts = [(codes + self.lift if self.lift else codes, scale, 8 - self.lift - zero)]
        else:  # 16 (high - 8) + (low - 8) + 136 = c
            self.lift = 0
            coarse = torch.round((136 - zero) / 16)
            parts = [
                (codes & 15, scale, 136 - zero - 16 * coarse),
                (codes >> 4, 16 * scale, coarse),
            ]
        for index, (half, unit, offset) in enumerate(parts):
            unit = unit.to(torch.bfloat16).to(unit.dtype)  # both belong to the rounded scale
            grid = torch.stack([unit, unit * offset], -1).transpose(0, 1).to(torch.bfloat16)
            self.keep(f"codes{index}", _packed(half))
            self.keep(f"grid{index}", grid.repeat_interleave(group // self.width, 0).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = self._buffers  # as attributes they would cost more than a small product
        if kept["order"] is not None:
            x = x[:, kept["order"]]
        count = len(x) * self.halves
        if count > FEWEST and x.dtype == torch.bfloat16 and not x.requires_grad and count > few():
            y = self._once(x)
            if y is not None:
                return y
        if len(x) > FEW:
            y = x.new_empty(len(x), self.rows)
            # float16 products of this layout are slower on a CPU than all else by far.
            wide = x.float() if x.dtype == torch.float16 else x
            for start in range(0, self.rows, CHUNK):
                y[:, start : start + CHUNK] = wide @ self._columns(start, wide.dtype)
            return y
        short, codes = x.to(torch.bfloat16), kept["codes0"]
        filler = 2 * codes.shape[1] - self.cols
        short = pad(short, (0, filler)) if filler else short.contiguous()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = multiply(short, codes, self.width, kept["grid0"])
        if self.halves == 2:
            y = y + multiply(short, kept["codes1"], self.width, kept["grid1"])
        y = y if y.shape[1] == self.rows else y[:, : self.rows]
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _once(self, x: Tensor) -> Tensor | None:
        """By a weight that is unpacked once, a part at a time; None where that cannot be had."""
        if _tile() != cpu_blocks.TILE or cpu_blocks.loops() is None:
            return None
        codes, more, units, zeros = arrays = self._arrays()
        rows, cols = units.shape[1], codes.shape[1]
        x = pad(x, (0, cols - self.cols)) if cols > self.cols else x.contiguous()
        if (amx := cpu_blocks.tiles()) is not None and len(x) <= amx.MOST:
            y = amx.multiply(arrays, self.lift, x)
            return y if rows == self.rows else y[:, : self.rows]
        unpack, starts = cpu_blocks.loops(), cpu_blocks.parts(rows, cols)
        y = x.new_empty(len(x), rows)
        for start in starts:
            part = cpu_blocks.scratch(min(starts.step, rows - start), cols)
            if part is None:
                return None
            grids = (units, zeros, self.lift, start // TILE)
            unpack.unpack(codes, more, *grids, part.halves, part.words)
            columns = part.product(x)
            if columns.shape == y.shape:
                y = columns
            else:
                y[:, start : start + columns.shape[1]] = columns
        return y if rows == self.rows else y[:, : self.rows]

    def _arrays(self) -> tuple[Any, ...]:
        """What is packed, as :mod:`.unpack` wants it: views, kept as making them takes its time."""
        kept: Any = self._buffers
        of, arrays = self.__dict__.get("_viewed", (None, ()))
        if of is not kept["codes0"]:
            tiles = (-1, 2 * self.codes0.shape[1], TILE // 2)
            codes, more = (
                None if packed is None else packed.view(tiles).numpy()
                for packed in (self.codes0, kept.get("codes1"))
            )
            units = self.grid0.view(torch.int16).numpy().view(np.uint16)
            arrays = (codes, more, units, self.zeros.numpy())
            self.__dict__["_viewed"] = kept["codes0"], arrays
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which makes its own views."""
        return {name: value for name, value in self.__dict__.items() if name != "_viewed"}

    def dense(self) -> Tensor:
        chunks = [self._columns(start, self.dtype).T for start in range(0, self.rows, CHUNK)]
        weight = torch.cat(chunks)
        if self.order is not None:
            weight[:, self.order] = weight.clone()
        return weight

    def _columns(self, start: int, dtype: torch.dtype) -> Tensor:
        """The dequantized rows from ``start``, at most ``CHUNK``, transposed: ``[cols, rows]``."""
        rows = slice(start, start + CHUNK)
        codes = _unpacked(self.codes0[rows], dtype)
        if self.halves == 2:
            codes += 16 * _unpacked(self.codes1[rows], dtype)
        codes = codes[: self.cols, : self.rows - start]
        grouped = codes.unflatten(0, (self.scales.shape[0], -1))
        # Contiguous rows: broadcast along strided ones, these two steps take ten times as long.
        zeros = (self.zeros[:, rows] + self.lift).to(dtype).contiguous()[:, : self.rows - start]
        scales = self.scales[:, rows].to(dtype).contiguous()
        return grouped.sub_(zeros[:, None]).mul_(scales[:, None]).flatten(0, 1)


def _packed(codes: Tensor) -> Tensor:
    """``codes [rows, cols]`` of whole tiles as the operator wants them, ``[rows, cols / 2]``."""
    (rows, columns), tile = codes.shape, _tile()
    if tile is None:
        return _by_operator(codes)
    tiles = codes.T.view(columns, rows // tile, 2, tile // 2)
    packed = torch.empty(rows // tile, columns, tile // 2, dtype=torch.uint8)
    packed.transpose(0, 1).copy_(tiles[:, :, 1]).bitwise_left_shift_(4).bitwise_or_(tiles[:, :, 0])
    return packed.view(rows, columns // 2)


def _by_operator(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes ``[cols, rows]`` of whole tiles, exact in ``dtype``."""
    rows, columns, tile = len(packed), 2 * packed.shape[1], _tile()
    if tile is None:  # the operator itself knows
        ones = torch.eye(columns, dtype=torch.bfloat16)
        grid = torch.tensor([1.0, 8.0], dtype=torch.bfloat16).expand(columns // 32, rows, 2)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(ones, packed, 32, grid.contiguous()).to(dtype)
    return _spread(packed, tile, dtype)


def _spread(packed: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
    """A tile lies as ``[cols, tile / 2]`` bytes: its first rows low, its last rows high."""
    rows, columns = len(packed), 2 * packed.shape[1]
    tiles = packed.view(rows // tile, columns, tile // 2).transpose(0, 1)
    codes = torch.empty(columns, rows // tile, 2, tile // 2, dtype=dtype)
    codes[:, :, 0] = tiles & 15
    codes[:, :, 1] = tiles >> 4
    return codes.view(columns, rows)


@cache
def _tile() -> int | None:
    """Rows in a tile of this processor's layout; None if it is laid out in a way of its own."""
    codes = torch.arange(TILE * 32, dtype=torch.int32).view(TILE, 32) * 7 % 16
    for tile in (TILE, TILE // 2):
        if torch.equal(_spread(_by_operator(codes), tile, torch.int32), codes.T):
            return tile
    return None
