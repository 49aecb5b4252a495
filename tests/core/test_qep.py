"""Error propagation: the correction of the weights, against the formula written out."""

import subprocess
import sys

import pytest
import torch

from optq.core import hessian
from optq.core.problem import Problem
from optq.core.qep import QEP
from optq.errors import SettingError

COLUMNS, TOKENS = 24, 200


def streams(shift: float, rows: int = 7):
    """Weights, inputs of the full-precision model, and inputs of the quantized one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float64)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    full = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64) @ mix
    noise = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
    return weight, full, full + shift * noise


def correct(qep, weight, H, drift):
    return qep.correct(Problem(H), weight, drift)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("percdamp", [0.01, 1.0])
@pytest.mark.parametrize("rows", [7, 40])  # fewer and more than columns
def test_the_corrected_weights_are_those_of_the_formula(alpha, percdamp, rows):
    weight, full, quantized = streams(0.3, rows)
    H = quantized.T @ quantized / TOKENS
    damped = H + percdamp * H.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    difference = (full - quantized).T @ quantized / TOKENS
    expected = weight + alpha * weight @ difference @ torch.linalg.inv(damped)
    corrected = correct(QEP(alpha, percdamp), weight, H, difference)
    torch.testing.assert_close(corrected, expected)


@pytest.mark.parametrize("rows", [16, 256])  # fewer and as many as columns
@pytest.mark.parametrize("mean", [0, 10])
def test_in_bfloat16_the_output_is_corrected_as_well(rows, mean, monkeypatch):
    """Also where all inputs share a mean that moves: what rounding adds to a product along it, the
    solve that follows would blow up in all other directions."""
    monkeypatch.setattr("optq.core.precision.fast_bfloat16", lambda device: True)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(2, 256, generator=generator, dtype=torch.float64).sign()
    x = torch.randn(2000, 256, generator=generator, dtype=torch.float64) + mean * signs[0]
    x[:, 0] *= 30  # an outlier
    d = 0.02 * mean * signs[1] + 0.05 * torch.randn(2000, 256, generator=generator)
    weight = torch.randn(rows, 256, generator=generator, dtype=torch.float64)
    H, drift = x.T @ x / 2000, d.T @ x / 2000
    exact = correct(QEP(), weight, H, drift) - weight
    rounded = correct(QEP(), weight.float(), H.float(), drift.float()).double() - weight
    off, size = (((each @ H) * each).sum() for each in (rounded - exact, exact))
    assert 0 < off < 1e-3 * size


@pytest.mark.parametrize(("mean", "most"), [(0, 1e-3), (10, 0.1)])
def test_the_drift_in_bfloat16_is_near_enough_to_correct_by(mean, most, monkeypatch):
    """What it is off by, in output energy, as ``add_drift`` says."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(2, 256, generator=generator).sign()
    x = torch.randn(2000, 256, generator=generator) + mean * signs[0]
    d = 0.02 * mean * signs[1] + 0.05 * torch.randn(2000, 256, generator=generator)
    x, y = x.bfloat16(), (x + d).bfloat16()
    weight = torch.randn(16, 256, generator=generator, dtype=torch.float64)
    H, shifts = x.double().T @ x.double() / 2000, []
    for quick in (False, True):
        monkeypatch.setattr(hessian, "fast_bfloat16", lambda device, quick=quick: quick)
        drift = torch.zeros(256, 256)
        hessian.add_drift(drift, x, y)
        shifts.append(correct(QEP(), weight, H, drift.double() / 2000) - weight)
    off, size = (((each @ H) * each).sum() for each in (shifts[1] - shifts[0], shifts[0]))
    assert 0 < off < most * size


def test_the_factor_of_a_solver_serves_if_its_damping_is_the_same():
    weight, full, quantized = streams(0.3)
    H, drift = quantized.T @ quantized / TOKENS, (full - quantized).T @ quantized / TOKENS
    for percdamp in (0.01, 0.1):
        known = Problem(H, percdamp, actorder=True)
        made = known.factor
        corrected = QEP().correct(known, weight, drift)
        assert known.factor is made and known.order is not None
        torch.testing.assert_close(corrected, correct(QEP(), weight, H, drift))


def test_equal_streams_change_nothing():
    weight, full, _ = streams(0.0)
    H = full.T @ full / TOKENS
    assert torch.equal(correct(QEP(), weight, H, torch.zeros_like(H)), weight)


def test_full_correction_without_damping_is_least_squares():
    """alpha = 1 and no damping: the best weights on the quantized inputs for the true output."""
    weight, full, quantized = streams(0.3)
    H, drift = quantized.T @ quantized / TOKENS, (full - quantized).T @ quantized / TOKENS
    corrected = correct(QEP(1.0, 0.0), weight, H, drift)
    best = torch.linalg.lstsq(quantized, full @ weight.T).solution.T
    torch.testing.assert_close(corrected, best)


def test_a_damping_that_is_no_fraction_is_refused():
    with pytest.raises(SettingError):
        QEP(percdamp=2.0)


def test_excluded_layers_are_named_by_a_regular_expression():
    some = QEP(exclude=r"down_proj|fc2$")
    assert not some.applies("model.layers.3.mlp.down_proj") and not some.applies("layers.0.fc2")
    assert some.applies("model.layers.3.mlp.up_proj") and QEP().applies("down_proj")
    with pytest.raises(SettingError, match="is not a regular expression"):
        QEP(exclude="(")


def test_options_of_another_type_are_refused_when_they_are_made():
    """In a process of its own: here, types are checked before OPTQ sees them."""
    program = """
from optq import GPTQ, QEP
from optq.errors import SettingError
wrong = [(QEP, "alpha", value) for value in ("0.5", None, True, [0.5])]
wrong += [(QEP, "exclude", 5), (QEP, "percdamp", "0.01"), (GPTQ, "wbits", [4])]
for kind, name, value in wrong:
    try:
        kind(**{name: value})
    except SettingError as error:
        assert error.cause == f"{name} is {value!r}", error
    else:
        raise AssertionError((name, value))
assert QEP(alpha=1).alpha == 1 and QEP(exclude="q_proj").applies("k_proj")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
