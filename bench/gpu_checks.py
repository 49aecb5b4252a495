"""Whether the Triton products are right, on the device itself: a part of ``bench/gpu.py``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from optq.core.weight import QuantizedWeight, group_index
from optq.kernels.triton_matmul import matmul_kernel
from optq.kernels.triton_matvec import matvec_kernel
from optq.kernels.triton_product import TritonProduct

ERROR = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # as in tests/kernels/test_triton.py

# What is checked first: bits, columns in a group, sym, shuffled columns, activations. Every
# property is there; each row compiles kernels of its own for some seconds.
CASES = (
    (4, 128, True, False, torch.bfloat16),
    (4, 32, False, True, torch.float16),
    (3, 128, True, False, torch.bfloat16),
    (3, -1, False, True, torch.float16),
    (2, 64, True, True, torch.float16),
    (2, 32, False, False, torch.bfloat16),
    (8, -1, True, False, torch.bfloat16),
    (8, 32, False, True, torch.float16),
)


def random_weight(
    wbits: int, rows: int, cols: int, groupsize: int, sym: bool, shuffled: bool, device: str
) -> QuantizedWeight:
    """Random codes and grids, weights of about the spread of a trained layer's."""
    width = cols if groupsize == -1 else groupsize
    grids = (rows, cols // width)
    scales = (0.04 * (1 + torch.rand(grids, device=device)) / 2**wbits).to(torch.float16).float()
    if sym:
        zeros = torch.full(grids, 2 ** (wbits - 1), dtype=torch.uint8, device=device)
    else:
        zeros = torch.randint(2**wbits, grids, dtype=torch.uint8, device=device)
    g_idx = group_index(cols, width, torch.device(device))
    if shuffled:
        g_idx = g_idx[torch.randperm(cols, device=device)]
    codes = torch.randint(2**wbits, (rows, cols), dtype=torch.uint8, device=device)
    return QuantizedWeight(wbits, codes, scales, zeros, g_idx)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


@contextmanager
def untuned() -> Iterator[None]:
    """One configuration of each kernel: tuning would compile all of them for each case."""
    kernels = (matvec_kernel, matmul_kernel)
    kept = [kernel.configs for kernel in kernels]
    for kernel in kernels:
        kernel.configs = kernel.configs[:1]
    try:
        yield
    finally:
        for kernel, configs in zip(kernels, kept, strict=True):
            kernel.configs = configs


def misses(device: str, rows: int, cols: int, tokens: tuple[int, ...]) -> list[str]:
    """The cases whose relative error (Frobenius norm) is above ERROR; fresh inputs for each."""
    found = []
    for *options, dtype in CASES:
        weight = random_weight(options[0], rows, cols, *options[1:], device)
        product = TritonProduct(weight, dtype)
        exact = weight.weight.double()
        case = "{} bits, groups of {}, sym {}, shuffled {}, ".format(*options) + str(dtype)
        if not torch.equal(product.dense(), weight.weight.to(dtype)):
            found.append(f"{case}: dequantized weights differ")
        for count in tokens:
            x = torch.randn(count, cols, device=device).to(dtype)
            poison = x.new_full((count, rows), torch.nan)
            del poison  # its memory is what the result is likely to get
            error = relative_error(product(x), x.double() @ exact.T)
            if not error < ERROR[dtype]:
                found.append(f"{case}, {count} rows of activations: error {error:.2e}")
    return found
