"""NVIDIA GPUs, in Triton: three ways to one product, chosen by the rows of activations.

* up to ``FEW``: multiply-adds on the ordinary cores (triton_matvec.py), whose work grows with
  every row;
* up to ``MANY``: the tensor cores, dequantizing in registers (triton_matmul.py); the weights are
  read, and dequantized, once for each ``TILE`` rows;
* above: dequantize once into memory and let the vendor's library multiply.

The layout is that of triton_layout.py. Columns are put in the order of their groups once;
activations follow at each call. Triton is imported where a product is built or called.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from optq.core.gpu import triton_serves
from optq.core.weight import QuantizedWeight
from optq.kernels.product import Product, compact
from optq.kernels.triton_layout import SLICE, pack_planes, period

# Not timed on a GPU yet; bench/gpu.py does. Counted in the machine code for compute capability 9.0
# (4 bits, groups of 128): instructions to a weight are 3.7 for one row of activations and 5.3 for
# two on the ordinary cores, 5.1 for up to 16 on the tensor cores. Reading at the speed of a copy
# on an H200 leaves time for 3.7 to 4.2.
FEW = 2
# Dequantizing writes and reads again 4 bytes a weight, 8 times the packed codes at 4 bits: the time
# of reading the codes for 8 tiles. Unpacking them costs more than reading, so half as many.
MANY = 256
TILE = 64  # rows of activations that one reading of the weights serves
FILLED = 264  # programs that fill a chip: two for each of 132 multiprocessors
SPLITS = 8  # shares of the columns, at most


def takes(weight: QuantizedWeight) -> bool:
    """Whether Triton serves here, and groups are one to a row or multiples of 16 columns."""
    if not triton_serves(weight.codes.device):
        return False
    if weight.groups == 1:
        return True
    whole = weight.cols == weight.width * weight.groups
    return whole and weight.width % SLICE == 0 and weight.sorted()[0].consecutive


class TritonProduct(Product):
    """Holds planes of words ``[rows, words]`` and the grids ``[rows, groups]``."""

    order: Tensor | None
    low: Tensor
    high: Tensor | None  # 3 bits only
    scales: Tensor
    zeros: Tensor | None  # where not every one is the middle

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight.rows, weight.cols, dtype)
        weight, order = weight.sorted()
        self.wbits, self.groups = weight.wbits, weight.groups
        low, high = pack_planes(weight.codes, weight.wbits)
        self.keep("order", order)
        self.keep("low", low)
        self.keep("high", high)
        self.keep("scales", compact(weight.scales).contiguous())
        self.keep("zeros", None if weight.sym else weight.zeros.contiguous())
        span = period(weight.wbits)
        self.periods = -(-weight.cols // span)
        self.width = weight.width if weight.groups > 1 else self.periods * span
        places = 4 if weight.wbits == 8 else 8
        self.layout = {
            "periods": self.periods,
            "wbits": weight.wbits,
            "sym": weight.sym,
            "HALVES": 2 if weight.wbits == 3 else 1,
            "PARTS": 2 if weight.wbits < 4 else 1,
            "PLACES": places,
            "RUN": math.gcd(self.width, SLICE * places) // SLICE,
        }

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x[:, self.order]
        if len(x) > MANY:
            return linear(x, self._dequantized(x.dtype))
        x = x.contiguous()
        with torch.cuda.device_of(x):  # Triton launches on the current one
            if len(x) <= FEW:
                return self._matvec(x)
            return self._matmul(x)

    def dense(self) -> Tensor:
        weight = self._dequantized(self.dtype)
        if self.order is not None:
            weight[:, self.order] = weight.clone()
        return weight

    def _planes(self) -> tuple[Tensor, ...]:
        """Codes and grids; an absent tensor's place is taken by one that is there."""
        high = self.low if self.high is None else self.high
        zeros = self.scales if self.zeros is None else self.zeros
        return self.low, high, self.scales, zeros

    def _sizes(self) -> tuple[int, ...]:
        from optq.kernels.triton_codes import EXPONENTS

        return self.rows, self.cols, self.groups, self.width, *EXPONENTS

    def _matvec(self, x: Tensor) -> Tensor:
        from optq.kernels.triton_matvec import matvec_kernel

        y = x.new_empty(len(x), self.rows)
        if len(x):
            matvec_kernel[self._grid](
                x, *self._planes(), y, *self._sizes(), TOKENS=len(x), **self.layout
            )
        return y

    def _matmul(self, x: Tensor) -> Tensor:
        from optq.kernels.triton_matmul import matmul_kernel

        tokens = len(x)
        tile = min(TILE, max(16, 1 << (tokens - 1).bit_length()))
        tiles = -(-tokens // tile)
        splits = self._splits(tiles)
        y = x.new_empty(splits, tokens, self.rows, dtype=torch.float32 if splits > 1 else x.dtype)
        matmul_kernel[lambda meta: (*self._grid(meta), tiles, splits)](
            x, *self._planes(), y, tokens, *self._sizes(),
            SPLITS=splits, TOKENS=tile, **self.layout,
        )  # fmt: skip
        return y[0] if splits == 1 else y.sum(0).to(x.dtype)

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        from optq.kernels.triton_matmul import dequantize_kernel

        weight = self.low.new_empty(self.rows, self.cols, dtype=dtype)
        with torch.cuda.device_of(weight):
            dequantize_kernel[(-(-self.rows // 64), self.periods)](
                *self._planes(), weight, *self._sizes(), ROWS=64, **self.layout
            )
        return weight

    def _grid(self, meta: dict[str, Any]) -> tuple[int]:
        return (-(-self.rows // meta["ROWS"]),)

    def _splits(self, tiles: int) -> int:
        """Shares of the columns that fill the chip, a power of two, with periods for each."""
        splits, programs = 1, -(-self.rows // 64) * tiles
        while splits < SPLITS and splits * programs < FILLED and 4 * splits <= self.periods:
            splits *= 2
        return splits
