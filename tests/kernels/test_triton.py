"""The Triton kernels against float64 arithmetic on the same codes, scales and activations.

On a machine without a GPU they run in Triton's interpreter, with one, compiled. A table of cases
takes every property at least once, instead of every combination: the interpreter is slow.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from optq.core import gpu
from optq.core.weight import QuantizedWeight, group_index
from optq.kernels import triton_product
from optq.kernels.triton_layout import pack_planes, period
from optq.kernels.triton_product import TritonProduct, takes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BITS = (2, 3, 4, 8)
# Relative error (Frobenius norm). The result is rounded to the activations' dtype (2^-9, 2^-12),
# and on the tensor cores each weight is too; a float32 product adds neither.
ERROR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-5}


def random_weight(wbits, rows, cols, groupsize=-1, sym=True, shuffled=False):
    """Random codes and grids; scales exact in float16."""
    width = cols if groupsize == -1 else groupsize
    groups = -(-cols // width)
    scales = (0.01 + 0.02 * torch.rand(rows, groups)).to(torch.float16).float()
    middle = torch.full((rows, groups), 2 ** (wbits - 1), dtype=torch.uint8)
    codes = torch.randint(2**wbits, (rows, cols), dtype=torch.uint8)
    zeros = middle if sym else torch.randint(2**wbits, (rows, groups), dtype=torch.uint8)
    g_idx = group_index(cols, width, codes.device)
    if shuffled:
        g_idx = g_idx[torch.randperm(cols)]
    return QuantizedWeight(wbits, codes, scales, zeros, g_idx).to(DEVICE)


def relative_error(y, weight, x):
    expected = x.double() @ weight.weight.double().T
    return ((y.double() - expected).norm() / expected.norm()).item()


# wbits, rows, cols, groupsize, sym, shuffled, dtype
WEIGHTS = [
    (4, 33, 256, 128, True, False, torch.bfloat16),
    (4, 100, 96, 32, False, True, torch.float16),
    (4, 17, 200, -1, True, False, torch.float32),
    (3, 33, 640, 128, True, False, torch.float16),
    (3, 20, 96, 32, False, True, torch.bfloat16),
    (3, 7, 100, -1, False, False, torch.float32),
    (2, 40, 256, 64, True, True, torch.bfloat16),
    (2, 33, 304, 16, False, False, torch.float16),
    (8, 33, 128, 128, True, False, torch.float16),
    (8, 70, 72, -1, False, False, torch.bfloat16),
    (8, 5, 160, 32, False, True, torch.float32),
]


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_every_layout_on_ordinary_and_on_tensor_cores(case, tokens):
    weight, dtype = random_weight(*case[:-1]), case[-1]
    x = torch.randn(tokens, weight.cols).to(DEVICE, dtype)
    y = TritonProduct(weight, dtype)(x)
    assert y.shape == (tokens, weight.rows) and y.dtype == dtype
    assert relative_error(y, weight, x) < ERROR[dtype]


@pytest.mark.parametrize("tokens", [2, 8, 16, 17, 33, 65])
def test_rows_of_activations_that_fill_tiles_and_do_not(tokens):
    weight = random_weight(4, 70, 160, 32, sym=False)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(tokens, weight.cols).to(DEVICE, dtype)
        assert relative_error(TritonProduct(weight, dtype)(x), weight, x) < ERROR[dtype]


@pytest.mark.parametrize("wbits", BITS)
def test_columns_are_shared_by_programs_where_rows_are_few(wbits):
    weight = random_weight(wbits, 16, 4 * period(wbits) - 16, 16 if wbits == 4 else -1)
    product = TritonProduct(weight, torch.float16)
    assert product._splits(1) > 1
    x = torch.randn(4, weight.cols).to(DEVICE, torch.float16)
    assert relative_error(product(x), weight, x) < ERROR[torch.float16]


def test_many_rows_are_multiplied_densely(monkeypatch):
    monkeypatch.setattr(triton_product, "MANY", 8)
    weight = random_weight(4, 33, 96, 32, sym=False, shuffled=True)
    product = TritonProduct(weight, torch.float32)
    x = torch.randn(9, weight.cols).to(DEVICE)
    assert relative_error(product(x), weight, x) < ERROR[torch.float32]


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_dequantized_weights_are_exact(case):
    weight, dtype = random_weight(*case[:-1]), case[-1]
    assert torch.equal(TritonProduct(weight, dtype).dense(), weight.weight.to(dtype))


@pytest.mark.parametrize("wbits", BITS)
def test_planes_take_exactly_the_bits(wbits):
    codes = torch.randint(2**wbits, (3, 2 * period(wbits)), dtype=torch.uint8)
    planes = [plane for plane in pack_planes(codes, wbits) if plane is not None]
    assert 8 * sum(plane.nbytes for plane in planes) == wbits * codes.numel()
    assert all(plane.dtype == torch.int32 and plane.is_contiguous() for plane in planes)


def test_grids_are_kept_as_they_are_stored():
    product = TritonProduct(random_weight(4, 8, 64, 32, sym=False), torch.bfloat16)
    assert product.scales.dtype == torch.float16 and product.zeros.dtype == torch.uint8
    assert TritonProduct(random_weight(4, 8, 64, 32), torch.bfloat16).zeros is None


def test_no_rows_and_strided_activations():
    weight = random_weight(4, 33, 64, 32)
    product = TritonProduct(weight, torch.float32)
    assert product(torch.empty(0, 64, device=DEVICE)).shape == (0, 33)
    x = torch.randn(64, 2, device=DEVICE).T
    assert relative_error(product(x), weight, x) < ERROR[torch.float32]


def test_an_outlier_in_the_activations_costs_no_accuracy():
    """Lifted codes are sums of an offset and the code; the offset's part must cancel well."""
    weight = random_weight(4, 32, 256, 128)
    x = torch.randn(1, 256, device=DEVICE)
    x[0, 17] = 3000.0
    assert relative_error(TritonProduct(weight, torch.float32)(x), weight, x) < 1e-5


def test_takes_groups_of_16_columns_or_one_to_a_row():
    assert takes(random_weight(4, 4, 100))
    assert takes(random_weight(4, 4, 96, 16, shuffled=True))
    assert not takes(random_weight(4, 4, 90, 32))  # the last group is short
    assert not takes(random_weight(4, 4, 80, 20))
    ragged = random_weight(4, 4, 64, 32)
    ragged.g_idx[31] = 1
    assert not takes(ragged)


def test_it_takes_nothing_without_triton(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert not takes(random_weight(4, 4, 64, 32))


def test_every_kernel_compiles_for_a_gpu_that_is_not_here():
    """The interpreter takes programs that the compiler refuses. A process of its own: which of
    the two runs is settled when Triton is imported."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 6
