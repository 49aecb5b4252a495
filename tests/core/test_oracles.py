"""The oracles against each other and against closed forms, before anything is held to them."""

import numpy as np
import oracles
import pytest
from core.problems import problem


def damped(H, percdamp=0.01):
    return H + oracles.damping(H, percdamp) * np.eye(len(H))


def test_a_grid_reaches_every_weight_of_its_group_within_half_a_step():
    values = np.random.default_rng(0).normal(size=50)
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            scale, zero = oracles.fit(values, bits, sym)
            codes = np.array([oracles.code_of(w, scale, zero, bits) for w in values])
            assert np.abs(values - scale * (codes - zero)).max() <= scale / 2 * (1 + 1e-9)


@pytest.mark.parametrize("sym", [True, False])
def test_the_range_search_loses_no_more_than_min_max_or_any_shrunk_range(sym):
    rng = np.random.default_rng(1)
    values, h = rng.normal(size=20), rng.uniform(size=20)
    scale, zero, clear = oracles.fit_search(values, 3, sym, importance=h)
    loss = oracles.fit_loss(values, scale, zero, 3, h)
    for shrink in (1.0, 0.78, 0.56):
        assert loss <= oracles.fit_loss(
            values, *oracles.fit(values, 3, sym, 0, *[shrink] * 2), 3, h
        )
    assert clear


def test_code_of_follows_at_a_tie_and_only_there():
    assert oracles.code_of(2.5, 1.0, 0, 3, follow=2) == 2
    assert oracles.code_of(2.5, 1.0, 0, 3, follow=3) == 3
    assert oracles.code_of(2.5, 1.0, 0, 3, follow=4) in (2, 3)
    assert oracles.code_of(2.6, 1.0, 0, 3, follow=2) == 3
    assert oracles.code_of(7.5, 1.0, 0, 3, follow=0) == 7


def test_obs_costs_what_the_closed_form_says():
    p = problem(1, 7)
    D, w = damped(p.H), p.W[0]
    inverse = np.linalg.inv(D)
    for j in range(7):
        new, cost = oracles.obs_remove(w, D, j)
        assert new[j] == pytest.approx(0, abs=1e-12)
        assert cost == pytest.approx(w[j] ** 2 / (2 * inverse[j, j]))
        np.testing.assert_allclose(new - w, -w[j] / inverse[j, j] * inverse[:, j], rtol=1e-9)


def test_no_other_move_with_the_same_weight_removed_costs_less():
    p = problem(1, 6, seed=3)
    D, rng = damped(p.H), np.random.default_rng(0)
    new, cost = oracles.obs_remove(p.W[0], D, 2)
    for _ in range(50):
        other = new - p.W[0] + rng.normal(size=6) * 0.1
        other[2] = -p.W[0, 2]
        assert other @ D @ other / 2 > cost


@pytest.mark.parametrize("sym", [True, False])
def test_obq_costs_add_up_to_half_the_damped_error(sym):
    p = problem(3, 8, seed=5)
    D, g_idx = damped(p.H), oracles.group_index(8, 4)
    scales, zeros, _ = oracles.fit_all(p.W, 3, g_idx, sym)
    for n, row in enumerate(p.W):
        codes, order, costs = oracles.obq_row(row, D, 3, scales[n], zeros[n], g_idx)
        q = oracles.dequantize(codes[None], scales[n : n + 1], zeros[n : n + 1], g_idx)[0]
        assert sorted(order) == list(range(8))
        assert sum(costs) == pytest.approx((row - q) @ D @ (row - q) / 2)


@pytest.mark.parametrize("options", [{}, {"actorder": True}, {"static_groups": True}])
def test_each_gptq_column_moves_the_rest_to_the_constrained_minimum(options):
    """OBQ's step in GPTQ's order, by dense solves: the paper's form against the definition."""
    p = problem(3, 10, seed=7)
    d = oracles.damping(p.H, 0.01)
    D = p.H + d * np.eye(10)
    sweep = oracles.gptq(p.W, p.H, d, 3, 4, **options)
    Q = sweep.weight
    for n in range(3):
        w, left = p.W[n].copy(), list(sweep.order)
        for column in sweep.order:
            assert w[column] == pytest.approx(sweep.reached[n, column], rel=1e-9)
            block = D[np.ix_(left, left)]
            change = Q[n, column] - w[column]
            w[left] += oracles.constrained_move(block, left.index(column), change)[0]
            left.remove(column)


def test_the_damped_error_is_the_sum_of_the_sweep_s_own_errors():
    p = problem(4, 12, seed=9)
    d = oracles.damping(p.H, 0.01)
    D = p.H + d * np.eye(12)
    sweep = oracles.gptq(p.W, p.H, d, 4, 5)
    R = np.linalg.cholesky(np.linalg.inv(D)).T
    own = ((sweep.reached - sweep.weight) ** 2 / np.diag(R) ** 2).sum(1)
    np.testing.assert_allclose(own, oracles.row_errors(p.W, sweep.weight, D), rtol=1e-9)
