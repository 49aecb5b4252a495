"""Activations in 8 bits, against plain loops."""

import pytest
import torch

from optq.core.tokens import by_token, int8_by_token, rounded


def oracle(row):
    """Codes and scale of one token, in Python's own floats."""
    scale = 2 * max(abs(x) for x in row) / 255
    if scale == 0:
        return [0] * len(row), None
    return [max(-128, min(127, round(x / scale))) for x in row], scale


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 8)])
def test_codes_and_scales(shape):
    x = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, shape[-1]).double()
    codes, scale = by_token(x)
    flat = x.reshape(-1, shape[-1]), codes.reshape(-1, shape[-1])
    for row, own, s in zip(*flat, scale.flatten(), strict=True):
        expected, wanted = oracle(row.tolist())
        same = [
            a == b or abs(abs(a) - 127.5) == 0.5 == abs(abs(b) - 127.5)
            for a, b in zip(own.tolist(), expected, strict=True)
        ]
        assert all(same)
        assert s.item() == pytest.approx(wanted, rel=1e-15)
        # No value is further from its code than half a step, but the clipped half at the top.
        assert (own * s - row).abs().max() <= 0.5000001 * s
    assert torch.equal(rounded(x), codes * scale)
    assert codes.abs().amax() <= 128 and codes.amax() <= 127


def test_zeros_halves_and_dtypes():
    x = torch.zeros(2, 4)
    x[1] = torch.tensor([1.0, -1.0, 0.25, 0.0])
    assert torch.equal(rounded(x)[0], torch.zeros(4))
    codes, scale = int8_by_token(x)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    top, low, quarter, zero = codes[1].tolist()
    # The largest is half way between two codes: above there is one on the negative side alone.
    assert codes[0].tolist() == [0] * 4 and (top, quarter, zero) == (127, 32, 0)
    assert low in (-127, -128)
    assert rounded(x.bfloat16()).dtype == torch.bfloat16
    # Computed in float32: the scale of a bfloat16 token is not rounded to bfloat16.
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(rounded(x), rounded(x.float()).bfloat16())
