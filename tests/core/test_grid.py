"""Grids: min-max and range search against the oracle, and what storage does to a scale."""

import numpy as np
import oracles
import pytest
import torch
from core.checks import solved
from core.problems import grid_options, problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.core.grid import IntegerGrid, Storage
from optq.core.rtn import RTN
from optq.errors import SettingError

EXACT = Storage(scale_dtypes=())
BOTH = Storage(scale_dtypes=(torch.float16, torch.bfloat16))
quick = settings(derandomize=True, deadline=None, max_examples=60)


def fit(W, options, storage=EXACT, dtype=torch.float64):
    """``scale, zero [rows, groups]`` that round-to-nearest fits to ``W [rows, cols]``."""
    weight, alive = torch.tensor(W, dtype=dtype), torch.eye(W.shape[1], dtype=dtype)
    solution = solved(RTN(**options), weight, alive, storage)
    return solution.scales.double().numpy(), solution.zeros.double().numpy()


def groups(W, groupsize):
    """Of every row of ``W``: ``(row, group, the group's weights)``."""
    g_idx = oracles.group_index(W.shape[1], groupsize)
    for n, row in enumerate(W):
        for g in range(g_idx[-1] + 1):
            yield n, g, row[g_idx == g]


@quick
@given(problems(), grid_options(mse=(False,)), st.sampled_from((0, 1)))
def test_min_max_is_the_oracle_s(p, options, min_zero):
    scale, zero = fit(p.W, options, Storage((), min_zero))
    for n, g, values in groups(p.W, options["groupsize"]):
        s, z = oracles.fit(values, options["wbits"], options["sym"], min_zero)
        assert scale[n, g] == pytest.approx(s, rel=1e-12)
        assert zero[n, g] == z


def search(W, H, options, storage=EXACT, dtype=torch.float64):
    """``scale, zero [rows, groups]`` of the range search, the columns weighed by ``diag H``."""
    weight, H = (torch.tensor(x, dtype=dtype) for x in (W, H))
    solution = solved(RTN(mse=True, **options), weight, H, storage)
    return solution.scales.double().numpy(), solution.zeros.double().numpy()


@pytest.mark.parametrize("weight", ["normal", "positive", "outliers"])
@pytest.mark.parametrize("groupsize", [-1, 8, 9])
@pytest.mark.parametrize("wbits", [2, 3, 4, 8])
@pytest.mark.parametrize(("sym", "min_zero"), [(True, 0), (False, 0), (False, 1)])
def test_the_range_search_is_the_oracle_s(sym, wbits, groupsize, weight, min_zero):
    p = problem(3, 26, weight=weight, seed=97)
    options = {"wbits": wbits, "groupsize": groupsize, "sym": sym}
    scale, zero = search(p.W, p.H, options, Storage((), min_zero))
    g_idx, h = oracles.group_index(26, groupsize), np.diag(p.H)
    s, z, clear = oracles.fit_all(p.W, wbits, g_idx, sym, h, min_zero)
    assert clear.any()
    np.testing.assert_allclose(scale[clear], s[clear], rtol=1e-12)
    np.testing.assert_array_equal(zero[clear], z[clear])


@quick
@given(problems(), grid_options(mse=(True,)), st.sampled_from((0, 1)))
def test_the_range_search_never_loses_to_min_max(p, options, min_zero):
    del options["mse"]
    W, h = p.W, np.diag(p.H)
    scale, zero = search(W, p.H, options, Storage((), min_zero))
    bits, g_idx = options["wbits"], oracles.group_index(W.shape[1], options["groupsize"])
    for n, g, values in groups(W, options["groupsize"]):
        own = h[g_idx == g]
        minmax = oracles.fit(values, bits, options["sym"], min_zero)
        limit = oracles.fit_loss(values, *minmax, bits, own)
        # Below the unit roundoff of the weights a miss is noise.
        floor = 1e-28 * (own * np.abs(values).max() ** 2).sum()
        found = oracles.fit_loss(values, scale[n, g], zero[n, g], bits, own)
        assert found <= limit * (1 + 1e-9) + floor


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("storage", [Storage(), BOTH])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_at_eight_bits_it_does_not_lose_by_storing_the_scale_either(sym, storage, size):
    """A step is so small there that what storing moves a scale by counts."""
    W = size * torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    H = torch.eye(64)
    searched, minmax = (solved(RTN(8, 32, sym, mse), W, H, storage) for mse in (True, False))
    assert (searched.error <= minmax.error * (1 + 1e-4)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_symmetric_grid_is_mirrored_where_that_serves_the_longer_tail(sign):
    """Steps -4 .. 3: only one sign of the scale has all of these weights on the grid."""
    values = sign * np.array([[4.0, -3.0, 2.0, 1.0, 3.0, -2.0, -1.0, 0.0]]) / 8
    scale, _ = fit(values, {"wbits": 3, "sym": True, "mse": True})
    assert np.sign(scale[0, 0]) == -sign
    assert abs(scale[0, 0]) == pytest.approx(1 / 8, rel=0.05)


def test_the_range_search_weighs_columns_by_their_inputs():
    """The outlier's input is small, so the range is the others'; and the other way round."""
    rng = np.random.default_rng(3)
    values = np.append(rng.uniform(-1, 1, size=15), 6.0)[None]
    quiet, loud = np.ones(16), np.ones(16)
    quiet[-1], loud[-1] = 1e-4, 1e4
    options = {"wbits": 3, "sym": True}
    (quiet_scale, _), (loud_scale, _) = (search(values, np.diag(h), options) for h in (quiet, loud))
    assert abs(quiet_scale[0, 0]) < 0.5 < abs(loud_scale[0, 0])


def test_many_rows_are_searched_as_each_alone(monkeypatch):
    p = problem(10, 16, seed=5)
    options = {"wbits": 3, "groupsize": 8}
    together = search(p.W, p.H, options)
    monkeypatch.setattr("optq.core.grid.WEIGHTS_AT_ONCE", 24)
    for one, other in zip(search(p.W, p.H, options), together, strict=True):
        np.testing.assert_array_equal(one, other)


@quick
@given(problems(), grid_options())
def test_zero_is_a_value_of_every_grid(p, options):
    _, zero = fit(p.W, options)
    assert ((zero >= 0) & (zero <= 2 ** options["wbits"] - 1)).all()


@quick
@given(problems(), grid_options(mse=(False,)), st.sampled_from((0, 1)))
def test_a_min_max_grid_has_every_weight_within_half_a_step(p, options, min_zero):
    """Groups of one sign included. Lifting a zero point from 0 to 1 may cost the least weight."""
    scale, zero = fit(p.W, options, Storage((), min_zero))
    for n, g, values in groups(p.W, options["groupsize"]):
        s, z = scale[n, g], zero[n, g]
        codes = [oracles.code_of(w, s, z, options["wbits"]) for w in values]
        assert np.abs(values - s * (np.array(codes) - z)).max() <= s / 2 * (1 + 1e-9)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("wbits", [2, 3, 4, 8])
def test_a_symmetric_grid_covers_a_group_of_one_sign(sign, wbits):
    values = sign * np.linspace(1, 2, 9)
    scale, zero = fit(values[None], {"wbits": wbits, "sym": True})
    assert scale[0, 0] == pytest.approx(2 * 2 / (2**wbits - 1))
    assert zero[0, 0] == 2 ** (wbits - 1)


@pytest.mark.parametrize("sym", [True, False])
def test_a_group_of_zeros_has_scale_one(sym):
    scale, _ = fit(np.array([[0.0, 0.0, 1.0, -1.0]]), {"wbits": 4, "groupsize": 2, "sym": sym})
    assert scale[0, 0] == 1 and scale[0, 1] == pytest.approx(2 / 15)


def test_a_ragged_last_group_is_fitted_on_its_own_columns():
    W = np.array([[1.0, -1.0, 8.0, 2.0, 0.5]])
    scale, _ = fit(W, {"wbits": 2, "groupsize": 2, "sym": True})
    np.testing.assert_allclose(scale, [[2 / 3, 16 / 3, 1 / 3]])


@quick
@given(problems(), grid_options(mse=(False,)))
def test_no_zero_point_is_below_the_smallest_that_the_file_holds(p, options):
    _, zero = fit(p.W, options, Storage(min_zero=1), torch.float32)
    assert zero.min() >= 1


EXTREMES = st.floats(-60, 60).map(lambda e: 2.0**e)


@settings(quick, max_examples=300)
@given(EXTREMES, st.sampled_from((Storage(), Storage((torch.bfloat16,)), BOTH)))
def test_a_stored_scale_is_exact_in_every_storage_dtype(value, storage):
    stored = storage.round(torch.tensor([value]))
    assert torch.equal(storage.round(torch.tensor([-value])), -stored)
    for dtype in storage.scale_dtypes:
        assert torch.equal(stored.to(dtype).to(stored.dtype), stored)
    assert torch.isfinite(stored).all() and (stored > 0).all()


@pytest.mark.parametrize("value", [65504.0, 65503.0, 65408.0, 65300.0, 65280.0, 1e6, 3e38])
def test_a_scale_at_the_end_of_float16_is_exact_in_both_dtypes(value):
    stored = BOTH.round(torch.tensor([value]))
    for dtype in BOTH.scale_dtypes:
        assert torch.equal(stored.to(dtype).to(stored.dtype), stored)
    assert torch.isfinite(stored).all()


@quick
@given(st.floats(2.0**-14, 6e4))
def test_a_stored_scale_is_the_nearest_one(value):
    exact = torch.tensor([value])
    assert Storage().round(exact).item() == exact.half().item()
    assert BOTH.round(exact).item() == exact.bfloat16().item()


@quick
@given(problems(), grid_options(), st.sampled_from((Storage(), Storage(min_zero=1), BOTH)))
def test_fitted_scales_are_exact_in_every_storage_dtype(p, options, storage):
    scale = torch.tensor(fit(p.W, options, storage, torch.float32)[0])
    for dtype in storage.scale_dtypes:
        assert torch.equal(scale.to(dtype).to(scale.dtype), scale)
    assert torch.isfinite(scale).all() and (scale != 0).all()


@pytest.mark.parametrize(
    "options",
    [{"wbits": 1}, {"wbits": 5}, {"wbits": 4, "groupsize": 0}, {"wbits": 4, "groupsize": -2}],
)
def test_a_grid_that_does_not_exist_is_refused(options):
    with pytest.raises(SettingError):
        IntegerGrid(**options)
