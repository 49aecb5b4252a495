"""OBQ: every step is the constrained minimum that a dense solver finds."""

import numpy as np
import oracles
import pytest
import torch
from core.checks import EXACT, STORAGES, check_solution, same_codes, solved
from core.problems import grid_options, problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.core.obq import OBQ, eliminate
from optq.core.rtn import RTN
from optq.errors import NumericsError, SettingError

quick = settings(derandomize=True, deadline=None, max_examples=40)
LIVE = ("correlated", "diagonal", "few tokens", "duplicates", "ill-conditioned", "outlier inputs")


def damped(H, percdamp=0.01):
    return H + oracles.damping(H, percdamp) * np.eye(len(H))


def test_elimination_leaves_the_inverse_of_what_is_left():
    """A batch of rows, each dropping weights of its own, one after another."""
    D = damped(problem(1, 7, seed=2).H)
    inverses = torch.tensor(np.linalg.inv(D)).repeat(2, 1, 1)
    dropped = [[4, 0, 6], [1, 5, 2]]
    for pair in zip(*dropped, strict=True):
        eliminate(inverses, torch.tensor(pair))
    for inverse, gone in zip(inverses, dropped, strict=True):
        left = [j for j in range(7) if j not in gone]
        np.testing.assert_allclose(
            inverse[left][:, left], np.linalg.inv(D[np.ix_(left, left)]), rtol=1e-9
        )
        assert (inverse[gone] == 0).all() and (inverse[:, gone] == 0).all()


# --------------------------------------------------------------------------------------------- OBQ


def compare(p, options):
    """The implementation's codes against a greedy run that solves every step densely."""
    solution = solved(OBQ(**options), *p.tensors(), EXACT)
    W = p.W
    D = p.H + solution.problem.damp * np.eye(len(p.H))
    bits, sym = options["wbits"], options["sym"]
    g_idx = oracles.group_index(W.shape[1], options["groupsize"])
    scales, zeros, _ = oracles.fit_all(W, bits, g_idx, sym)
    follow = solution.codes.numpy().astype(int)
    greedy = np.stack(
        [
            oracles.obq_row(w, D, bits, scales[n], zeros[n], g_idx, follow[n])[0]
            for n, w in enumerate(W)
        ]
    )
    rounded = oracles.round_to_nearest(W, bits, scales, zeros, g_idx)
    codes, sure = oracles.never_worse(
        W,
        p.H,
        oracles.dequantize(greedy, scales, zeros, g_idx),
        oracles.dequantize(rounded, scales, zeros, g_idx),
        (greedy, rounded),
    )
    assert solution.g_idx.tolist() == g_idx.tolist()
    np.testing.assert_allclose(solution.scales, scales, rtol=1e-12)
    same_codes(solution, codes, scales, sure, p.W)
    return solution, sure


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("groupsize", [-1, 4, 5])
@pytest.mark.parametrize("wbits", [2, 4])
def test_every_step_is_the_cheapest_constrained_minimum(sym, groupsize, wbits):
    options = {"wbits": wbits, "groupsize": groupsize, "sym": sym}
    _, sure = compare(problem(3, 12, seed=3), options)
    assert sure.all()


@quick
@given(
    problems(
        hessians=(*LIVE, "dead columns"), weights=("normal", "positive", "outliers", "zeros")
    ).filter(lambda p: p.W.shape[1] <= 10 and np.diag(p.H).any()),
    grid_options(mse=(False,)),
)
def test_every_step_is_the_cheapest_for_any_weight_and_hessian(p, options):
    compare(p, options)


@pytest.mark.parametrize("groupsize", [-1, 8])
def test_a_diagonal_hessian_gives_round_to_nearest(groupsize):
    W, H = problem(5, 20, "diagonal", seed=5).tensors()
    obq, rtn = (solved(s(3, groupsize), W, H, EXACT) for s in (OBQ, RTN))
    assert torch.equal(obq.codes, rtn.codes)


def test_one_column_is_round_to_nearest():
    W, H = problem(5, 1, seed=6).tensors()
    assert torch.equal(solved(OBQ(3), W, H, EXACT).codes, solved(RTN(3), W, H, EXACT).codes)


def test_rows_at_work_together_are_solved_as_each_alone(monkeypatch):
    p = problem(7, 12, seed=7)
    together = solved(OBQ(3, 4), *p.tensors(), EXACT)
    monkeypatch.setattr("optq.core.obq.ENTRIES_AT_ONCE", 2 * 12**2)
    assert torch.equal(solved(OBQ(3, 4), *p.tensors(), EXACT).codes, together.codes)


# --------------------------------------------------------------------------------------- promises


@settings(quick, max_examples=60)
@given(
    problems(max_cols=16),
    grid_options(),
    st.sampled_from(STORAGES),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from((0.0, 1e-6, 0.01, 0.1)),
)
def test_every_solution_keeps_its_promises(p, options, storage, dtype, percdamp):
    solution = solved(OBQ(percdamp=percdamp, **options), *p.tensors(dtype), storage)
    check_solution(solution, p, options, storage, dtype)


def test_a_hessian_of_zeros_gives_round_to_nearest():
    W, H = problem(3, 8).tensors()[0], torch.zeros(8, 8, dtype=torch.float64)
    solution = solved(OBQ(4), W, H)
    assert solution.problem.dead.all() and (solution.error == 0).all()
    assert torch.equal(solution.codes, solved(RTN(4), W, H).codes)


def test_solving_leaves_its_inputs_alone():
    W, H = problem(3, 10, "dead columns", seed=8).tensors()
    before = W.clone(), H.clone()
    solved(OBQ(4, 4), W, H)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


def test_a_hessian_with_a_nan_is_an_error():
    W, H = problem(2, 8).tensors()
    H[1, 1] = float("nan")
    with pytest.raises(NumericsError):
        solved(OBQ(4), W, H)


@pytest.mark.parametrize("options", [{"wbits": 6}, {"groupsize": -3}, {"percdamp": 2.0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(SettingError):
        OBQ(**({"wbits": 4} | options))
