"""8-bit weights by 8-bit activations: a product of integers, exact in int32, then the scales.

``y = s_token * s_row * sum_k x8 w8`` with ``x8`` from :mod:`optq.core.tokens`. PyTorch multiplies:
``_int_mm``, which is oneDNN's on CPUs and cuBLAS' on GPUs. A row sums to less than ``2**31`` up to
131072 columns. CuBLAS wants more than 16 tokens and multiples of 8, so few tokens are padded there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from optq.core.tokens import int8_by_token
from optq.core.weight import QuantizedWeight
from optq.errors import ModelError
from optq.kernels.product import Product

LEAST, UNIT = 17, 8  # tokens, and what sizes are multiples of, on a GPU


class Int8TokensProduct(Product):
    """Holds ``codes [cols, rows]`` as int8 around 0, and one scale to a row."""

    name = "int8_tokens"
    codes: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight.rows, weight.cols, dtype)
        if weight.wbits != 8 or weight.groups != 1 or not weight.sym:
            raise ModelError(
                "a product of integers wants 8 bits, symmetric, and one scale to a row",
                "quantize the model again, with --abits 8",
            )
        codes = (weight.codes ^ 128).view(torch.int8)
        if codes.device.type == "cuda":
            codes = pad(codes, (0, -weight.cols % UNIT, 0, -weight.rows % UNIT))
        self.keep("codes", codes.contiguous())
        self.keep("scales", weight.scales[:, 0].to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = int8_by_token(x)
        if codes.device.type == "cuda":
            codes = pad(codes, (0, -self.cols % UNIT, 0, max(LEAST - len(x), -len(x) % UNIT)))
        sums = torch._int_mm(codes, self.codes.T)[: len(x), : self.rows]
        return (sums.to(scale.dtype) * scale * self.scales).to(x.dtype)

    def dense(self) -> Tensor:
        codes = self.codes[: self.rows, : self.cols].to(torch.float32)
        return codes.mul_(self.scales[:, None]).to(self.dtype)
