"""Dequantize and multiply: what every other kernel is compared with, and takes over from.

The codes stay packed as :mod:`optq.core.packing` packs them, down the columns; columns that do
not fill a word are padded with zeros. The weights exist for the time of one product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from optq.core.packing import pack, unpack
from optq.core.weight import QuantizedWeight, dequantize
from optq.kernels.product import Product, compact


class ReferenceProduct(Product):
    """Holds ``words [ceil(cols * wbits / 32), rows]`` and the grids ``[rows, groups]``."""

    words: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight.rows, weight.cols, dtype)
        self.wbits = weight.wbits
        self.keep("words", pack(pad(weight.codes, (0, -weight.cols % 32)).T, weight.wbits))
        self.keep("scales", compact(weight.scales))
        self.keep("zeros", weight.zeros)
        self.keep("g_idx", weight.g_idx)

    def dense(self) -> Tensor:
        codes = unpack(self.words, self.wbits)[: self.cols].T
        return dequantize(codes.contiguous(), self.scales.to(self.dtype), self.zeros, self.g_idx)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dense())
