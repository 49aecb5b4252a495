"""The kernels, and which one serves a layer.

A kernel turns a :class:`QuantizedWeight` into a module that holds the codes in the layout it
wants and computes ``x @ W.T`` for ``x [tokens, cols]``. To add one: write its file, and a row
here. The row puts it through the conformance tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from optq.core.grid import BITS
from optq.core.weight import QuantizedWeight
from optq.errors import ModelError
from optq.kernels import cpu_int4, cpu_int8, triton_product
from optq.kernels.int8_tokens import Int8TokensProduct
from optq.kernels.product import Product
from optq.kernels.reference import ReferenceProduct
from optq.kernels.triton_product import TritonProduct


@dataclass(frozen=True)
class Kernel:
    """One way to multiply by a packed weight.

    ``error`` states its accuracy: the relative error (Frobenius norm) of the product against
    float64 arithmetic on the same codes, scales and activations, by the activations' dtype.
    """

    name: str
    devices: tuple[str, ...]  # torch.device.type
    wbits: tuple[int, ...]
    error: dict[torch.dtype, float]
    takes: Callable[[QuantizedWeight], bool]  # beyond device, bits and dtype
    build: Callable[[QuantizedWeight, torch.dtype], Product]

    def serves(self, weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        """Whether it multiplies activations of ``dtype`` by this weight, where the weight is."""
        return (
            weight.codes.device.type in self.devices
            and weight.wbits in self.wbits
            and dtype in self.error
            and self.takes(weight)
        )


ROUNDED = {torch.bfloat16: 6e-3, torch.float16: 6e-3, torch.float32: 6e-3}  # all, to bfloat16
TENSOR_CORES = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
DENSE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}

# The first that serves is taken.
KERNELS = (
    Kernel("cpu_int8", ("cpu",), (8,), ROUNDED, cpu_int8.takes, cpu_int8.Int8Product),
    Kernel("cpu_int4", ("cpu",), BITS, ROUNDED, cpu_int4.takes, cpu_int4.Int4Product),
    Kernel("triton", ("cuda",), BITS, TENSOR_CORES, triton_product.takes, TritonProduct),
    Kernel("reference", ("cpu", "cuda"), BITS, DENSE, lambda weight: True, ReferenceProduct),
)


def build(weight: QuantizedWeight, dtype: torch.dtype, abits: int | None = None) -> Product:
    """The product with a weight, by the kernel that :func:`pick` names.

    Where activations are quantized too, to ``abits``, there is one kernel: what it computes is not
    what the others do, so it has no row among them.
    """
    if abits is not None:
        return Int8TokensProduct(weight, dtype)
    kernel = pick(weight, dtype)
    product = kernel.build(weight, dtype)
    product.name = kernel.name
    return product


def pick(weight: QuantizedWeight, dtype: torch.dtype) -> Kernel:
    """The kernel for activations of ``dtype`` on the weight's device.

    Raises :class:`ModelError` where there is none.
    """
    for kernel in KERNELS:
        if kernel.serves(weight, dtype):
            return kernel
    raise ModelError(
        f"there is no kernel for {dtype} on {weight.codes.device.type}",
        "set dtype in config.json to bfloat16, float16 or float32",
    )
