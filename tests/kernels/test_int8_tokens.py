"""The product of 8-bit weights and 8-bit activations: exact integers, then the scales."""

import numpy as np
import pytest
import torch
from kernels.test_conformance import devices, make_weight

from optq.core.tokens import int8_by_token, rounded
from optq.errors import ModelError
from optq.kernels.int8_tokens import Int8TokensProduct
from optq.model.linear import QuantizedLinear

SHAPES = [(64, 128), (33, 70), (1, 5), (600, 64), (16, 4096)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 17, 33, 100])
def test_the_sums_are_those_of_integers(shape, tokens, device):
    """Bit for bit what NumPy's 64-bit integers give, ends of the range included."""
    weight = make_weight(*shape, -1, 8, True, False, device)
    weight.codes[0] = 0  # -128, all in one row: what saturating instructions would lose
    x = torch.randn(tokens, shape[1], device=device)
    x[0] = -1.0
    product = Int8TokensProduct(weight, torch.float32)
    codes, scale = int8_by_token(x)
    integers = codes.cpu().numpy().astype(np.int64) @ (
        weight.codes.cpu().numpy().astype(np.int64).T - 128
    )
    expected = torch.from_numpy(integers).float() * scale.cpu() * weight.scales[:, 0].cpu()
    assert torch.equal(product(x).cpu(), expected)
    assert torch.equal(product.dense(), weight.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_product_of_rounded_activations(dtype):
    weight = make_weight(64, 128, -1, 8, True, False)
    x = torch.randn(2, 3, 128).to(dtype)
    layer = QuantizedLinear(128, 64, True)
    layer.bias.data = torch.randn(64).to(dtype)
    layer.fill(weight, dtype, abits=8)
    assert layer.product.name == "int8_tokens"
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, 64)
    wanted = rounded(x.double()) @ weight.weight.double().T + layer.bias.double()
    error = (y.double() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def test_weights_that_it_does_not_take():
    for wrong in (
        make_weight(64, 128, 32, 8, True, False),
        make_weight(64, 128, -1, 8, False, False),
        make_weight(64, 128, -1, 4, True, False),
    ):
        with pytest.raises(ModelError, match="8 bits, symmetric, and one scale to a row"):
            Int8TokensProduct(wrong, torch.float32)
