"""SmoothQuant's scales and their search, against the formula and plain loops in float64."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from optq import GPTQ, RTN, SmoothQuant
from optq.core.grid import Storage
from optq.core.smoothquant import ALPHAS, smoothing_scales
from optq.core.weight import LayerScheme
from optq.errors import SettingError


def planted(rows=24, columns=40, tokens=200, outliers=(3, 17), factor=50.0):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x[:, list(outliers)] *= factor
    weight[:, list(outliers)] /= factor
    return weight, x


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_formula(alpha):
    weight, x = planted()
    x[:, 5] = 0
    weight[:, 6] = 0
    scales = smoothing_scales(x.abs().amax(0), weight.abs().amax(0), alpha)
    for j in range(40):
        top, strongest = x[:, j].abs().max().item(), weight[:, j].abs().max().item()
        wanted = 1.0 if j in (5, 6) else top**alpha / strongest ** (1 - alpha)
        assert scales[j].item() == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close((x / scales) @ (weight * scales).T, x @ weight.T)


def eight_bits(a):
    """Each row on its own symmetric 8-bit grid; NumPy."""
    scale = 2 * np.abs(a).max(1, keepdims=True) / 255
    return np.clip(np.round(a / scale), -128, 127) * scale


def product_error(weight, x, scales):
    x8, w8 = eight_bits(x.numpy() / scales), eight_bits(weight.numpy() * scales)
    wanted = x.numpy() @ weight.numpy().T
    return ((x8 @ w8.T - wanted) ** 2).sum() / (wanted**2).sum()


def test_the_search_takes_the_least_error_of_the_quantized_product():
    weight, x = planted()
    largest, strongest = x.abs().amax(0), weight.abs().amax(0)
    found = SmoothQuant().smoothing(weight, largest, x)
    errors = {None: product_error(weight, x, np.ones(40))}
    for alpha in ALPHAS:
        scales = largest.numpy() ** alpha / strongest.numpy() ** (1 - alpha)
        errors[alpha] = product_error(weight, x, scales)
    best = min(errors, key=errors.get)
    assert found.alpha == best is not None
    assert found.error == float(f"{errors[best]:.4g}")
    assert found.plain == float(f"{errors[None]:.4g}")
    assert found.error < 0.02 * found.plain  # which is what smoothing is for
    torch.testing.assert_close(found.scales, smoothing_scales(largest, strongest, best))
    fixed = SmoothQuant(alpha=0.3).smoothing(weight, largest, x)
    assert fixed.alpha == 0.3 and fixed.error == float(f"{errors[0.3]:.4g}")


def test_no_smoothing_is_a_candidate():
    """Columns that all are alike: scales would only add what they move."""
    weight, x = torch.ones(4, 8), torch.ones(16, 8)
    found = SmoothQuant().smoothing(weight, x.amax(0), x)
    assert found.alpha is None and found.scales is None and found.error == found.plain


@pytest.mark.parametrize(("rounding", "own"), [("gptq", GPTQ(8)), ("rtn", RTN(8))])
def test_weights_are_those_of_the_method_that_rounds_them(rounding, own):
    weight, x = planted()
    weight, H = weight.float(), (x.T @ x / len(x)).float()
    solver = SmoothQuant(rounding=rounding)
    assert solver.scheme() == LayerScheme(8, -1, True, abits=8)
    mine = solver.solve(solver.problem(H), weight, storage=Storage())
    theirs = own.solve(own.problem(H), weight, storage=Storage())
    assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scales, theirs.scales)
    assert mine.sym and (mine.error <= mine.rtn_error * 1.0001).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wbits": 4}, "wbits is 4, and weights and activations are multiplied in 8 bits"),
        ({"abits": 4}, "abits is 4"),
        ({"abits": True}, "abits is True"),
        ({"alpha": 1.5}, r"alpha is 1\.5"),
        ({"alpha": "on"}, "alpha is 'on'"),
        ({"rounding": "obq"}, "rounding is 'obq'"),
        ({"percdamp": 2.0}, "percdamp is"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(SettingError, match=message):
        SmoothQuant(**options)


def test_options_are_told():
    assert asdict(SmoothQuant(alpha="off")) == {
        "wbits": 8, "abits": 8, "alpha": "off", "rounding": "gptq", "percdamp": 0.01,
    }  # fmt: skip
    assert not SmoothQuant(alpha="off").smooths and SmoothQuant(alpha=0.0).smooths
