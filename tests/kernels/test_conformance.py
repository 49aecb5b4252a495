"""Every kernel of the table, against the float64 product, to the accuracy that its row states."""

import itertools

import pytest
import torch

from optq.core.weight import QuantizedWeight
from optq.errors import ModelError
from optq.kernels import cpu_int4, cpu_int8
from optq.kernels.table import KERNELS, pick
from optq.model.linear import QuantizedLinear

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [  # rows, cols, groupsize: whole tiles, and what fills none
    (64, 128, 32),
    (96, 256, 128),
    (128, 512, -1),
    (600, 64, 64),
    (100, 96, 32),
    (33, 70, -1),
    (17, 40, 8),
    (8, 32, 32),
]
BATCHES = (1, 2, 7, 33)
MANY = cpu_int4.FEW + 1  # rows of activations that go the way of a dense product


def make_weight(rows, cols, groupsize, wbits, sym, permuted, device="cpu"):
    generator = torch.Generator().manual_seed(rows * cols + wbits)
    width = cols if groupsize == -1 else groupsize
    groups = cols // width
    g_idx = (torch.arange(cols) // width).to(torch.int32)
    if permuted:
        g_idx = g_idx[torch.randperm(cols, generator=generator)]
    middle = torch.full((rows, groups), 2 ** (wbits - 1), dtype=torch.uint8)
    fitted = torch.randint(2**wbits, (rows, groups), dtype=torch.uint8, generator=generator)
    codes = torch.randint(2**wbits, (rows, cols), dtype=torch.uint8, generator=generator)
    # Not exact in bfloat16, of both signs, and far apart.
    scales = (torch.randn(rows, groups, generator=generator) / 16).half().float()
    weight = QuantizedWeight(wbits, codes, scales, middle if sym else fitted, g_idx)
    return weight.to(torch.device(device))


def exact(weight):
    scales = weight.scales.double()
    return QuantizedWeight(weight.wbits, weight.codes, scales, weight.zeros, weight.g_idx).weight


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def devices():
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_multiplies(kernel, device, shape):
    if device not in kernel.devices:
        pytest.skip(f"for {kernel.devices}")
    served, inputs = 0, torch.randn(MANY, 512)
    for wbits, sym, permuted, dtype in itertools.product(
        kernel.wbits, (True, False), (False, True), DTYPES
    ):
        weight = make_weight(*shape, wbits, sym, permuted, device)
        if not kernel.serves(weight, dtype):
            continue
        served += 1
        product, expected = kernel.build(weight, dtype), exact(weight)
        assert torch.equal(product.dense().cpu(), dense(weight, dtype).cpu())
        for batch in (*BATCHES, MANY):
            x = inputs[:batch, : weight.cols].to(dtype).to(device)
            y = product(x)
            assert y.dtype == dtype and y.shape == (batch, weight.rows)
            error = relative(y, x.double() @ expected.T)
            assert error < kernel.error[dtype], (wbits, sym, permuted, dtype, batch)
    if kernel.name == "reference":
        assert served == 4 * 2 * 2 * 3


def dense(weight, dtype):
    """Dequantized in the activations' dtype: one rounding of the scale, one of the product."""
    scales = weight.scales.to(dtype)
    return QuantizedWeight(weight.wbits, weight.codes, scales, weight.zeros, weight.g_idx).weight


def test_the_table_covers_everything():
    """Whatever a checkpoint holds, and on which device, there is a kernel, the reference last."""
    assert KERNELS[-1].name == "reference" and len({k.name for k in KERNELS}) == len(KERNELS)
    for wbits, dtype in itertools.product((2, 3, 4, 8), DTYPES):
        odd = make_weight(17, 40, 8, wbits, False, True)
        assert pick(odd, dtype).name == "reference"


@pytest.mark.parametrize(
    ("shape", "wbits", "name"),
    [
        ((64, 128, 32), 4, "cpu_int4"),
        ((64, 128, 128), 2, "cpu_int4"),
        ((33, 70, -1), 3, "cpu_int4"),
        ((64, 128, 64), 8, "cpu_int4"),
        ((64, 128, -1), 8, "cpu_int8"),
        ((64, 70, -1), 8, "cpu_int4"),  # the 8-bit operator reads beyond such a row
        ((64, 96, 48), 4, "reference"),
    ],
    ids=str,
)
def test_pick_on_the_cpu(shape, wbits, name):
    assert pick(make_weight(*shape, wbits, True, False), torch.bfloat16).name == name


def test_groups_of_unequal_size_go_to_the_reference():
    weight = make_weight(64, 128, 32, 4, True, False)
    weight.g_idx[31] = 1
    assert pick(weight, torch.bfloat16).name == "reference"
    product = pick(weight, torch.float32).build(weight, torch.float32)
    x = torch.randn(3, 128)
    assert relative(product(x), x.double() @ exact(weight).T) < 1e-6


@pytest.mark.parametrize("wbits", [4, 8])
def test_a_layout_that_is_not_known(monkeypatch, wbits):
    """On a processor with a tile of its own the operator packs and unpacks by itself."""
    monkeypatch.setattr(cpu_int4, "_tile", lambda: None)
    weight = make_weight(96, 256, 128, wbits, False, True)
    product = cpu_int4.Int4Product(weight, torch.bfloat16)
    assert torch.equal(product.dense(), dense(weight, torch.bfloat16))
    x = torch.randn(5, 256).bfloat16()
    assert relative(product(x), x.double() @ exact(weight).T) < 1e-2


def test_the_layout_of_this_processor_is_known():
    """Else the tests above say nothing of the packing that is written here."""
    assert cpu_int4._tile() in (32, 64)


def packed_linear(weight, bias, dtype):
    layer = QuantizedLinear(weight.cols, weight.rows, bias is not None)
    layer.fill(weight, dtype)
    if bias is not None:
        layer.bias.data = bias
    return layer


@pytest.mark.parametrize(
    ("wbits", "groupsize", "most"), [(4, 128, 0.28), (8, 128, 0.545), (8, -1, 0.51)]
)
def test_memory(wbits, groupsize, most):
    weight = make_weight(1024, 2048, groupsize, wbits, True, False)
    layer = packed_linear(weight, None, torch.bfloat16)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held <= most * 1024 * 2048 * 2


def test_float16_keeps_its_range_in_the_dense_product():
    """bfloat16 inside must not cost the exactness of the path for many tokens."""
    weight = make_weight(64, 128, 32, 4, True, False)
    product = cpu_int4.Int4Product(weight, torch.float32)
    x = torch.randn(MANY, 128)
    assert relative(product(x), x.double() @ exact(weight).T) < 1e-6
    product = cpu_int8.Int8Product(make_weight(64, 128, -1, 8, True, False), torch.float32)
    assert relative(product(x), x.double() @ product.dense().double().T) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_keeps_leading_dimensions_and_adds_its_bias(bias):
    weight = make_weight(96, 256, 128, 4, True, False)
    offset = torch.randn(96) if bias else None
    layer = packed_linear(weight, offset, torch.float32)
    x = torch.randn(2, 3, 256)
    expected = x.double() @ exact(weight).T + (0 if offset is None else offset)
    assert layer(x).shape == (2, 3, 96)
    assert relative(layer(x), expected) < 1e-2
    assert torch.equal(layer.weight, exact(weight).float())


@pytest.mark.parametrize("groupsize", [48, 32, -1], ids=["reference", "int4", "int8"])
def test_the_activations_dtype_may_change_and_the_device_may_not(groupsize):
    weight = make_weight(96, 96, groupsize, 8, False, False)
    layer = packed_linear(weight, torch.randn(96).bfloat16(), torch.bfloat16)
    x = torch.randn(3, 96)
    before = [(name, buffer.dtype) for name, buffer in layer.named_buffers()]
    layer.float()
    assert [(name, buffer.dtype) for name, buffer in layer.named_buffers()] == before
    assert layer(x).dtype == layer.weight.dtype == torch.float32
    expected = x.double() @ exact(weight).T + layer.bias.double()
    assert relative(layer(x), expected) < 1e-2
    with pytest.raises(ModelError, match="packed for cpu, not for meta"):
        layer.to("meta")
