"""Pruning: OBS and the sweep against plain loops, patterns, and the promises."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from core.checks import EXACT, array, solved
from core.problems import problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.core import compiled
from optq.core.error import damped_error
from optq.core.grid import Storage
from optq.core.magnitude import Magnitude, Wanda
from optq.core.methods import PRUNERS
from optq.core.obs import OBS, remove
from optq.core.pruning import Pattern, Uncoded
from optq.core.refit import refit
from optq.core.rounding import working_copy
from optq.core.solution import Solution
from optq.core.sparsegpt import UNIT, SparseGPT
from optq.errors import SettingError

quick = settings(derandomize=True, deadline=None, max_examples=40)
PAPER = {"refit": 0}


def damped(H, percdamp=0.01):
    return H + oracles.damping(H, percdamp) * np.eye(len(H))


def inverse_of(D):
    return torch.tensor(np.linalg.inv(D))


# ------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize("kept", [Pattern.of_text("2:4"), Pattern.of_text("3:8")])
def test_a_pattern_keeps_the_most_salient_of_each(kept):
    saliency = torch.randn(24, 7).abs()
    saliency[:, 0] = 1.0  # all alike: the first go
    keep = kept.keep(saliency)
    parts = keep.T.reshape(7, -1, kept.of)
    assert (parts.sum(2) == kept.kept).all()
    assert parts[0].tolist() == [[False] * (kept.of - kept.kept) + [True] * kept.kept] * len(
        parts[0]
    )
    values = saliency.T.reshape(7, -1, kept.of)
    least = torch.where(parts, values, torch.inf).amin(2)
    assert (torch.where(parts, 0, values).amax(2) <= least).all()


@pytest.mark.parametrize("together", [1, 4, 64])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.01, 0.99])
def test_a_share_is_exact_whatever_the_blocks(share, together):
    """Also of equal weights, of rows that fill no unit, and of blocks without a whole number."""
    rows, columns, pattern = 10, 50, Pattern.of_text(share)
    saliency = torch.randn(columns, rows).abs()
    saliency[:, 3] = 1.0
    kept = [
        pattern.keep(part, first, together)
        for first, part in zip(range(0, columns, 16), saliency.split(16), strict=True)
    ]
    gone = (~torch.cat(kept)).sum(0)
    if together == 1:
        assert (gone == int(share * columns + 1e-9)).all()
    else:
        units = [min(together, rows - top) for top in range(0, rows, together)]
        counts = [part.sum().item() for part in gone.split(together)]
        assert counts == [int(share * columns * unit + 1e-9) for unit in units]
    one = pattern.keep(saliency, 0, together)
    if together == 64:
        limit = saliency[~one].max()
        assert (saliency[one] >= limit).all()


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, 1.5, "4:4", "0:4", "5:4", "half", "", "2:4:8"])
def test_what_is_no_sparsity_is_refused(bad):
    with pytest.raises(SettingError, match="the sparsity is"):
        SparseGPT(bad)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"groupsize": 32}, "groups, range search and zero points"),
        ({"sym": False}, "groups, range search and zero points"),
        ({"wbits": 5}, "wbits is 5"),
        ({"sparsity": "4:8", "wbits": 4, "groupsize": 12}, "groups of 12 columns would part"),
        ({"refit": -1}, "refit is -1"),
        ({"percdamp": 2.0}, "percdamp is 2.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, cause):
    with pytest.raises(SettingError, match=cause):
        SparseGPT(**({"sparsity": "2:4"} | options))
    with pytest.raises(SettingError, match="obs removes weights"):
        OBS(0.5, 4)


def test_a_pattern_that_does_not_divide_the_columns_is_refused():
    with pytest.raises(SettingError, match="2:4 does not divide the 10 columns of X"):
        SparseGPT("2:4").check_layer("X", 3, 10)
    SparseGPT("2:4").check_layer("X", 3, 12)
    SparseGPT(0.5).check_layer("X", 3, 11)


# ------------------------------------------------------------------------------------------ OBS


def obs_row(w, D, kept, of, follow):
    """A row by plain loops: every step tries every weight with a dense constrained solve.

    ``follow``: the order to take at a tie, and only there.
    """
    w, left, rise = np.array(w), list(range(len(w))), []
    gone = []
    while len(gone) < len(w) * (of - kept) // of:
        found = []
        for place, p in enumerate(left):
            if sum(g // of == p // of for g in gone) < of - kept:
                dw, cost = oracles.constrained_move(D[np.ix_(left, left)], place, -w[p])
                found.append((cost, p, dw))
        least = min(cost for cost, _, _ in found)
        near = {p: (cost, dw) for cost, p, dw in found if cost <= least * (1 + 1e-9) + 1e-18}
        p = follow[len(gone)] if follow[len(gone)] in near else min(near)
        cost, dw = near[p]
        w[left] += dw
        w[p] = 0
        left.remove(p)
        gone.append(p)
        rise.append(cost)
    return w, gone, rise


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "1:4"])
@pytest.mark.parametrize("kind", ["correlated", "diagonal", "few tokens", "ill-conditioned"])
def test_every_step_of_obs_is_the_cheapest_and_costs_what_it_says(sparsity, kind):
    """The predicted cost is half of what the measured error rises by, step by step."""
    p = problem(3, 12, kind, seed=4)
    solver = OBS(sparsity)
    D = p.H + solver.problem(torch.tensor(p.H)).factor.damp * np.eye(12)
    pattern = solver.pattern
    left, order, costs = remove(inverse_of(D), torch.tensor(p.W), pattern, torch.ones(len(D)))
    kept, of = (pattern.kept, pattern.of) if pattern.of else (6, 12)
    for n, w in enumerate(p.W):
        values, gone, rise = obs_row(w, D, kept, of, order[n].tolist())
        assert gone == order[n].tolist()
        np.testing.assert_allclose(left[n], values, atol=1e-7 * np.abs(w).max())
        np.testing.assert_allclose(costs[n], rise, rtol=1e-6)
        error = oracles.row_errors(p.W[n : n + 1], array(left[n : n + 1]), D)[0]
        np.testing.assert_allclose(2 * costs[n].sum(), error, rtol=1e-6)


def test_what_obs_leaves_is_the_least_squares_of_what_it_keeps():
    p = problem(4, 16, seed=5)
    D = damped(p.H)
    left, _, _ = remove(inverse_of(D), torch.tensor(p.W), Pattern.of_text(0.5), torch.ones(len(D)))
    for w, v in zip(p.W, array(left), strict=True):
        kept = v != 0
        best = np.linalg.solve(D[np.ix_(kept, kept)], D[kept] @ w)
        np.testing.assert_allclose(v[kept], best, rtol=1e-7)


# ------------------------------------------------------------------------------------ the sweep


def sparsegpt(W, H, d, of, kept=None, share=0.5, together=1):
    """The paper's form in plain loops: the inverse's Cholesky, a mask for each ``of`` columns.

    ``kept`` of each ``of``; or all but a ``share`` of what ``together`` rows have of them.
    """
    rows, cols = W.shape
    R = np.linalg.cholesky(np.linalg.inv(H + d * np.eye(cols))).T
    work, keep, damped_error = np.array(W), np.ones(W.shape, dtype=bool), np.zeros(rows)
    for j in range(cols):
        if j % of == 0:
            stop = min(j + of, cols)
            worth = (work[:, j:stop] / np.diag(R)[j:stop]) ** 2
            for top in range(0, rows, together):
                own = worth[top : top + together]
                if kept is not None:
                    count = (of - kept) * len(own)
                else:
                    count = int(share * stop * len(own) + 1e-9) - int(share * j * len(own) + 1e-9)
                for flat in np.argsort(own.flatten(), kind="stable")[:count]:
                    row, column = np.unravel_index(flat, own.shape)
                    keep[top + row, j + column] = False
        for n in range(rows):
            if not keep[n, j]:
                e = work[n, j] / R[j, j]
                damped_error[n] += e**2
                work[n, j:] -= e * R[j, j:]
                work[n, j] = 0
    return work, keep, damped_error


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4", "1:4", "4:8"])
def test_the_sweep_is_the_paper_s_form(sparsity, loops, monkeypatch):
    """Masks equal, weights equal; and the predicted costs add up to the measured damped error."""
    if not loops:
        monkeypatch.setattr("optq.core.sparsegpt.serves", lambda _: False)
    p = problem(9, 320, seed=6)
    solver = SparseGPT.plain(sparsity, blocksize=48)
    made = solver.problem(torch.tensor(p.H))
    W, pattern = working_copy(torch.tensor(p.W)), solver.pattern
    sweep = solver._sweep(Uncoded(), [made], [W.clone()], pattern, EXACT)
    how = {"of": pattern.block, "kept": pattern.kept or None, "share": pattern.share}
    how["together"] = 1 if pattern.of else UNIT
    values, keep, cost = sparsegpt(p.W, p.H, made.factor.damp, **how)
    assert (sweep.keep.T.numpy() == keep).all()
    np.testing.assert_allclose((W - sweep.W).T, values, atol=1e-8 * np.abs(p.W).max())
    np.testing.assert_allclose(sweep.residual, cost, rtol=1e-8)
    D = p.H + made.factor.damp * np.eye(320)
    np.testing.assert_allclose(cost, oracles.row_errors(p.W, values, D), rtol=1e-8)
    assert (sweep.codes.T.numpy() == keep).all()


@pytest.mark.parametrize("options", [{"groupsize": 64}, {}, {"groupsize": 16, "sym": False}])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_joint_compiled_and_plain_loops_agree(sparsity, options, monkeypatch):
    if compiled.loops() is None:
        pytest.skip("Numba is not here")
    W, H = problem(70, 192, seed=7).tensors()
    for refit_steps in (0, 3):
        solver = SparseGPT(sparsity, 3, refit=refit_steps, **options)
        one = solved(solver, W, H, EXACT)
        with monkeypatch.context() as patch:
            patch.setattr("optq.core.sparsegpt.serves", lambda _: False)
            other = solved(solver, W, H, EXACT)
        assert torch.equal(one.codes, other.codes)
        torch.testing.assert_close(one.error, other.error)


def test_a_group_s_grid_is_fitted_to_the_weights_as_they_are_then():
    """With everything else exact: rows whose updated weights the grid of 8 bits holds closely."""
    p = problem(64, 256, seed=8)
    pruned = solved(SparseGPT.plain("2:4"), *p.tensors(), EXACT)
    joint = solved(SparseGPT.plain("2:4", 8, groupsize=64), *p.tensors(), EXACT)
    assert joint.error.sum() < 1.01 * pruned.error.sum()


# ---------------------------------------------------------------------------------------- refit


def test_refit_ends_at_the_least_squares():
    p = problem(3, 14, seed=9)
    solver = SparseGPT(0.5)
    made, W = solver.problem(torch.tensor(p.H)), working_copy(torch.tensor(p.W))
    keep = Pattern.of_text(0.5).keep(W.abs())
    D, errors = damped(p.H), []
    for steps in (0, 1, 2, 4, 40):
        v = refit(W, W * keep, keep, made, steps)
        assert (v[~keep] == 0).all()
        errors.append(oracles.row_errors(p.W, array(v.T), D))
    assert all((b <= a * (1 + 1e-12)).all() for a, b in pairwise(errors))
    for n, w in enumerate(p.W):
        own = keep[:, n].numpy()
        best = np.linalg.solve(D[np.ix_(own, own)], D[own] @ w)
        np.testing.assert_allclose(v[own, n], best, rtol=1e-6)


def strong(columns, rows, kind, seed=0):
    """Float32 weights, and the Hessian of inputs that have a mean or a few tokens of great size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator)
    if kind == "mean":
        x += 10 * torch.randn(columns, generator=generator)
    else:
        x[:3] *= 300
    return x.T @ x / len(x), torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("kind", ["mean", "tokens"])
def test_refit_in_float32_where_inputs_have_strong_directions(kind):
    """No row loses, and as much is gained as in float64."""
    H, weight = strong(256, 64, kind)
    keep, gains = Pattern.of_text(0.5).keep(working_copy(weight).abs()), []
    for dtype in (torch.float64, torch.float32):
        made, W = SparseGPT(0.5).problem(H.to(dtype)), working_copy(weight).to(dtype)
        start = W * keep
        moved = refit(W, start, keep, made, 8)
        before, after = (damped_error(W - v, made.factor) for v in (start, moved))
        assert (after <= before).all()
        gains.append((after.sum() / before.sum()).item())
    assert gains[0] < 0.5 and gains[1] < 1.02 * gains[0]


def test_rows_are_refitted_as_among_others():
    """To the bit, also of many columns: ranks share rows."""
    H, weight = strong(2048, 448, "mean")
    made, W = SparseGPT(0.5).problem(H), working_copy(weight)
    keep = Pattern.of_text(0.5).keep(W.abs())
    whole = refit(W, W * keep, keep, made, 3)
    for part in (slice(0, 192), slice(192, 448)):
        own = W[:, part].contiguous()
        kept = keep[:, part].contiguous()
        assert torch.equal(refit(own, own * kept, kept, made, 3), whole[:, part])


@pytest.mark.parametrize("solver", [SparseGPT.plain(0.25), Wanda(0.25), OBS(0.25)], ids=repr)
def test_dead_columns_go_first_the_smallest_before_the_others(solver):
    """They cost nothing; those that stay are the larger ones."""
    p = problem(6, 16, seed=4)
    W, H = p.tensors()
    dead = torch.arange(16) < 8
    H[dead], H[:, dead] = 0, 0
    left = solver.solve(solver.problem(H), W).weight != 0
    assert left[:, ~dead].all()
    own = W[:, dead].abs()
    per_row = [] if isinstance(solver, SparseGPT) else zip(own, left[:, dead], strict=True)
    assert all(row[~kept].max() < row[kept].min() for row, kept in per_row)
    assert own[~left[:, dead]].sum() < 0.6 * own[left[:, dead]].sum()


@pytest.mark.parametrize("kept", [3, 12])
def test_patterns_of_many_columns_keep_the_most_salient(kept):
    saliency = torch.rand(48, 5)
    keep = Pattern.of_text(f"{kept}:16").keep(saliency)
    for part, own in zip(saliency.split(16), keep.split(16), strict=True):
        assert (own.sum(0) == kept).all()
        assert torch.equal(own, part >= part.topk(kept, 0).values[-1])


# ------------------------------------------------------------------------------------- promises

SOLVERS = [
    *(method(0.5) for method in PRUNERS.values()),
    *(method("2:4") for method in PRUNERS.values()),
    SparseGPT.plain(0.5),
    SparseGPT(0.3, 4, 8),
    SparseGPT("2:4", 3, 8, sym=False),
    SparseGPT.plain(0.5, 2, groupsize=16),
    SparseGPT("4:8", 4),
    Magnitude("2:4", 4, 8),
    Wanda(0.5, 3, 16, mse=True),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("kind", ["correlated", "dead columns", "few tokens", "duplicates", "zero"])
@pytest.mark.parametrize("weight", ["normal", "zeros", "constant rows"])
def test_the_promises_hold(solver, kind, weight):
    """True errors, none above magnitude's with as many zeros, and as many zeros as were asked."""
    p = problem(9, 32, kind, weight, seed=3)
    W, H = p.tensors()
    shift = 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    dead = H.diagonal() == 0
    for aim in (None, torch.where(dead, W, W + shift)):
        solution = solved(solver, W, H, EXACT, aim)
        Q = array(solution.weight)
        error = oracles.row_errors(p.W, Q, p.H)
        np.testing.assert_allclose(array(solution.error), error, rtol=1e-6, atol=1e-9)
        zeros = (Q == 0).sum(1)
        pattern = solver.pattern
        if pattern.of:
            assert ((Q.reshape(9, -1, pattern.of) != 0).sum(2) <= pattern.kept).all()
        else:
            assert zeros.sum() >= int(pattern.share * 32 * 9 + 1e-9) - 9
        if solver.wbits is None:
            small = np.sort(np.abs(p.W), axis=1)
            for n, count in enumerate(zeros):
                if (p.W[n] != 0).all() and not pattern.of:  # magnitude, by hand
                    left = np.where(np.abs(p.W[n]) >= small[n, min(count, 31)], p.W[n], 0)
                    if (left == 0).sum() == count:
                        other = oracles.row_errors(p.W[n : n + 1], left[None], p.H)[0]
                        assert error[n] <= other * (1 + 1e-9) + 1e-12
        elif pattern.of:
            other, sure = by_magnitude(solver, p, solver.problem(H).importance)
            assert (error <= other * (1 + 1e-6) + 1e-9)[sure].all()
        assert (solution.error <= solution.rtn_error * (1 + 1e-9) + 1e-12).all()


def by_magnitude(solver, p, importance):
    """The errors of rows pruned by hand and rounded by a plain loop; and where these are clear."""
    rows, cols = p.W.shape
    of, kept = solver.pattern.of, solver.pattern.kept
    parts = np.abs(p.W).reshape(rows, -1, of)
    place = parts.argsort(2, kind="stable").argsort(2)
    left = p.W * (place >= of - kept).reshape(rows, cols)
    g_idx = oracles.group_index(cols, solver.groupsize)
    search = array(importance).ravel() if solver.mse else None
    scales, zeros, sure = oracles.fit_all(left, solver.wbits, g_idx, solver.sym, search)
    codes = oracles.round_to_nearest(left, solver.wbits, scales, zeros, g_idx)
    Q = oracles.dequantize(codes, scales, zeros, g_idx)
    return oracles.row_errors(p.W, Q, p.H), sure


@settings(quick, max_examples=60)
@given(
    problems(max_cols=20),
    st.sampled_from([SparseGPT(0.5), SparseGPT.plain(0.4), SparseGPT(0.5, 4, 8), OBS(0.5)]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_nothing_breaks_it(p, solver, dtype):
    solution = solved(solver, *p.tensors(dtype), Storage())
    assert torch.isfinite(solution.weight).all() and torch.isfinite(solution.error).all()
    assert (solution.error <= solution.rtn_error * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("solver", [SparseGPT("2:4"), SparseGPT(0.5, 4, 12), OBS(0.5)], ids=repr)
def test_experts_solved_together_get_what_each_gets_alone(solver):
    kinds = ("correlated", "dead columns", "few tokens")
    each = [problem(9, 36, kind, seed=seed).tensors() for seed, kind in enumerate(kinds)]
    weights, nothing = [W for W, _ in each], [None] * 3
    alone = [solver.solve(solver.problem(H), W, None, EXACT) for W, H in each]
    problems = [solver.problem(H) for _, H in each]
    for one, other in zip(
        alone, solver.solve_together(problems, weights, nothing, EXACT), strict=True
    ):
        assert torch.equal(one.codes, other.codes)
        torch.testing.assert_close(one.weight, other.weight)
        torch.testing.assert_close(one.error, other.error)


def test_values_are_those_that_a_file_keeps():
    W, H = problem(5, 32, seed=10).tensors(torch.float32)
    storage = Storage((), weight_dtype=torch.bfloat16)
    solution = solved(SparseGPT(0.5), W, H, storage)
    assert torch.equal(solution.weight, solution.weight.bfloat16().float())
    halves = solution.split([2, 3])
    assert torch.equal(Solution.cat(halves).weight, solution.weight)
    error = oracles.row_errors(array(W), array(solution.weight), array(H))
    np.testing.assert_allclose(array(solution.error), error, rtol=1e-4)


def test_sixty_four_rows_are_solved_as_among_others():
    """So that parts of a layer, on several processes, are the whole's."""
    W, H = problem(160, 64, seed=11).tensors()
    solver = SparseGPT(0.5)
    whole = solved(solver, W, H, EXACT).weight
    parts = [solved(solver, part, H, EXACT).weight for part in W.split(UNIT)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_wanda_and_magnitude_choose_as_their_papers_say():
    p = problem(4, 20, "outlier inputs", seed=12)
    H = np.diag(np.diag(p.H))  # nothing to make up for: Wanda's choice is the best there is
    W = torch.tensor(p.W)
    for method, saliency in ((Magnitude, np.abs(p.W)), (Wanda, p.W**2 * np.diag(H))):
        solution = solved(method(0.5), W, torch.tensor(H), EXACT)
        for n in range(4):
            gone = np.argsort(saliency[n])[:10]
            assert sorted(np.flatnonzero(array(solution.weight)[n] == 0)) == sorted(gone)
    methods = OBS(0.5, percdamp=0.0), Wanda(0.5)
    obs, wanda = (solved(each, W, torch.tensor(H), EXACT) for each in methods)
    assert torch.equal(obs.codes, wanda.codes)
    assert replace(SparseGPT(0.5), refit=0) == SparseGPT.plain(0.5)
