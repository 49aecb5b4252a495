"""CPU: PyTorch's own product with 8-bit codes and one scale to a row, ``_weight_int8pack_mm``.

It computes ``x @ C.T`` times a scale for each row, in float32 sums, and is fast with bfloat16
activations only: others are cast for it. A zero point adds ``(128 - z) * scale * sum(x)``.
Groups are not for it: :mod:`.cpu_int4` takes 8 bits in two halves.

Accuracy: as :mod:`.cpu_int4`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optq.core.weight import QuantizedWeight
from optq.kernels.product import Product, compact

FEW = 24  # rows of activations; beyond, a dense product is faster (bench/kernels.py)


def takes(weight: QuantizedWeight) -> bool:
    """Whether there is one group to a row; a row that ends inside a vector is read beyond."""
    return weight.groups == 1 and weight.cols % 32 == 0


class Int8Product(Product):
    """Holds ``codes [rows, cols]`` as int8 around 128, and one scale and offset to a row."""

    codes: Tensor
    scales: Tensor
    unit: Tensor
    shift: Tensor | None

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight.rows, weight.cols, dtype)
        self.keep("codes", (weight.codes.contiguous() ^ 128).view(torch.int8))
        self.keep("scales", compact(weight.scales[:, 0]))
        self.keep("shift", None if weight.sym else 128 - weight.zeros[:, 0].to(torch.float32))
        self.keep("unit", weight.scales[:, 0].to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > FEW:
            return x @ self.dense().T.to(x.dtype)
        y = torch._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), self.codes, self.unit)
        if self.shift is not None:
            total = x.to(torch.float32).sum(1, keepdim=True)
            y = y + total * (self.shift * self.unit)
        return y.to(x.dtype)

    def dense(self) -> Tensor:
        weight = self.codes.to(self.dtype)
        if self.shift is not None:
            weight += self.shift[:, None].to(self.dtype)
        return weight.mul_(self.scales[:, None].to(self.dtype))
