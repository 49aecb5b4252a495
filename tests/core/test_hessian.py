"""The Hessian, its damped factor, and the error measured with them."""

import numpy as np
import oracles
import pytest
import torch
from core.problems import problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.core import hessian, tiles
from optq.core import problem as problem_module
from optq.core.error import output_energy
from optq.core.hessian import Hessian
from optq.core.problem import factor
from optq.errors import NumericsError

quick = settings(derandomize=True, deadline=None, max_examples=60)


def relative(a, b):
    return (a.double() - b).norm() / b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [8, 1024])
def test_the_matrix_is_the_mean_outer_product_of_the_tokens(dtype, tile, monkeypatch):
    """At any activation dtype the sums are float32's: rounding happens to the inputs alone."""
    monkeypatch.setattr(hessian, "TILE", tile)
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    H = Hessian(20)
    H.add(x)
    matrix = H.matrix()
    assert matrix.dtype == torch.float32
    assert relative(matrix, torch.tensor(oracles.hessian(x.double().numpy()))) < 1e-6


def test_batches_of_any_shape_add_up_to_the_whole():
    x = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    H = Hessian(6, dtype=torch.float64)
    H.add(x[:8].view(2, 4, 6))
    H.add(x[8:9].view(6))
    H.add(x[9:9])
    H.add(x[9:])
    assert H.tokens == 24
    torch.testing.assert_close(H.matrix(), x.T @ x / 24)


def test_the_matrix_is_symmetric_to_the_bit(monkeypatch):
    monkeypatch.setattr(hessian, "TILE", 7)
    H = Hessian(30)
    H.add(torch.randn(50, 30, generator=torch.Generator().manual_seed(2)))
    matrix = H.matrix()
    assert torch.equal(matrix, matrix.T)


def test_the_matrix_is_the_same_when_read_again():
    H = Hessian(4)
    H.add(torch.ones(10, 4))
    first = H.matrix().clone()
    assert torch.equal(H.matrix(), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quick", [False, True])
def test_the_drift_is_the_sum_of_the_products_with_the_difference(dtype, quick, monkeypatch):
    """Streams that differ by a thousandth: what is taken from two large sums would be noise."""
    monkeypatch.setattr(hessian, "fast_bfloat16", lambda device: quick)
    monkeypatch.setattr(hessian, "TOKENS", 16)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4, 30, 12, generator=generator).to(dtype)
    y = (x + 1e-3 * torch.randn(4, 30, 12, generator=generator)).to(dtype)
    total = torch.zeros(12, 12)
    hessian.add_drift(total, x[:3], y[:3])
    hessian.add_drift(total, x[3:], y[3:])
    X, Y = (each.double().view(-1, 12) for each in (x, y))
    size = (Y - X).abs().T @ X.abs()
    rounded = 2**-8 if quick and dtype == torch.bfloat16 else 1e-5
    assert ((total - (Y - X).T @ X).abs() <= rounded * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_all_counted_however_few_are_multiplied_at_a_time(dtype, monkeypatch):
    """Batches that shrink and grow, so that memory which is reused holds older tokens."""
    monkeypatch.setattr(hessian, "TOKENS", 8)
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(8)).to(dtype)
    H = Hessian(6)
    for part in x.split([3, 20, 1, 9, 27]):
        H.add(part)
    assert H.tokens == 60
    assert relative(H.matrix(), torch.tensor(oracles.hessian(x.double().numpy()))) < 1e-6


def test_a_matrix_of_no_tokens_is_zero():
    assert torch.equal(Hessian(3).matrix(), torch.zeros(3, 3))


def test_inputs_are_left_as_they_were():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    before = x.clone()
    Hessian(4).add(x)
    assert torch.equal(x, before)


def test_the_precision_setting_survives_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError):
        Hessian(4).add(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert torch.get_float32_matmul_precision() == before


@quick
@given(problems(), st.sampled_from((0.001, 0.01, 0.1, 1.0)))
def test_the_factor_multiplies_back_to_the_damped_hessian(p, percdamp):
    H = torch.tensor(p.H)
    f = factor(H, percdamp)
    assert f.damp == pytest.approx(oracles.damping(p.H, percdamp))
    assert f.tries == 0
    assert torch.equal(f.U, f.U.triu()) and (f.pivots > 0).all()
    assert torch.equal(f.U, f.N * f.pivots) and (f.N.diagonal() == 1).all()
    live = f.live.bool()
    damped = H + f.damp * torch.eye(len(H), dtype=torch.float64)
    product = f.U @ f.U.T
    torch.testing.assert_close(product[live][:, live], damped[live][:, live], rtol=1e-9, atol=0)
    off = product - torch.diag(product.diagonal())
    assert (off[~live] == 0).all()
    assert torch.equal(~live, torch.tensor(np.diag(p.H) == 0))


@pytest.mark.parametrize("kind", ["correlated", "dead columns"])
@pytest.mark.parametrize("block", [1, 4, 7])
def test_a_factor_made_in_blocks_is_the_factor_made_at_once(kind, block, monkeypatch):
    H = torch.tensor(problem(1, 30, kind, seed=5).H)
    whole = factor(H, 0.01)
    monkeypatch.setattr(problem_module, "CHOLESKY_BLOCK", block)
    torch.testing.assert_close(factor(H, 0.01).U, whole.U)


@pytest.mark.parametrize("block", [4, 256])
def test_a_block_that_does_not_factor_damps_the_whole(block, monkeypatch):
    """Wherever in the matrix the negative direction is."""
    monkeypatch.setattr(problem_module, "CHOLESKY_BLOCK", block)
    for at in range(12):
        H = torch.eye(12, dtype=torch.float64)
        H[at, at] = -0.05
        f = factor(H, 0.01)
        assert f.damp == pytest.approx(0.1 * 10.95 / 12)
        torch.testing.assert_close(f.U @ f.U.T, H + f.damp * torch.eye(12, dtype=torch.float64))


def test_factoring_leaves_the_hessian_as_it_was():
    H = torch.tensor(problem(1, 9, "dead columns").H)
    before = H.clone()
    factor(H, 0.01)
    assert torch.equal(H, before)


def indefinite(shift):
    """A Hessian whose least eigenvalue is ``-shift`` times the mean of its diagonal, which is 1."""
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]
    values = np.linspace(-shift, 2 + shift, 12)
    return torch.tensor(vectors * values @ vectors.T)


@pytest.mark.parametrize(
    ("shift", "percdamp", "damp", "tries"),
    [
        (0.05, 0.2, 0.2, 0),
        (0.05, 0.01, 0.1, 1),
        (0.005, 0.0001, 0.01, 2),
        (0.4, 0.05, 0.5, 1),
        (0.8, 0.05, 1.0, 2),
        (0.05, 0.0, 0.1, None),
    ],
)
def test_damping_grows_tenfold_until_the_hessian_factors(shift, percdamp, damp, tries):
    H = indefinite(shift)
    f = factor(H, percdamp)
    assert f.damp == pytest.approx(damp)
    assert tries is None or f.tries == tries
    torch.testing.assert_close(f.U @ f.U.T, H + f.damp * torch.eye(12, dtype=torch.float64))


def test_damping_stops_at_the_mean_of_the_diagonal():
    with pytest.raises(NumericsError):
        factor(indefinite(1.1), 0.01)


@pytest.mark.parametrize("kind", ["few tokens", "duplicates", "ill-conditioned"])
@pytest.mark.parametrize("percdamp", [0.0, 1e-7, 0.01])
def test_a_hessian_that_is_singular_in_float32_still_factors(kind, percdamp):
    for seed in range(5):
        H = torch.tensor(problem(1, 40, kind, seed=seed).H, dtype=torch.float32)
        f = factor(H, percdamp)
        assert torch.isfinite(f.U).all()
        assert f.damp <= H.diagonal().mean().item() * (1 + 1e-6)
        damped = H.double() + f.damp * torch.eye(40, dtype=torch.float64)
        assert relative(f.U.double() @ f.U.double().T, damped) < 1e-5


@quick
@given(problems(), st.sampled_from((3, 1024)))
def test_the_output_energy_is_the_error_of_no_weights_at_all(p, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", tile)
        energy = output_energy(*p.tensors())
    expected = oracles.row_errors(p.W, np.zeros_like(p.W), p.H)
    scale = (np.abs(p.W) @ np.abs(p.H) * np.abs(p.W)).sum(1)
    assert (np.abs(energy.numpy() - expected) <= 1e-13 * scale).all()


def test_the_output_energy_in_bfloat16_is_near_enough_to_divide_by(monkeypatch):
    monkeypatch.setattr("optq.core.precision.fast_bfloat16", lambda device: True)
    p = problem(64, 200, seed=6)
    energy = output_energy(*p.tensors(torch.float32)).sum().item()
    exact = oracles.row_errors(p.W, np.zeros_like(p.W), p.H).sum()
    assert energy == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_hessian_that_is_not_finite_is_an_error(poison):
    H = torch.eye(4)
    H[1, 2] = H[2, 1] = poison
    with pytest.raises(NumericsError):
        factor(H, 0.01)
