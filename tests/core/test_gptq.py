"""GPTQ: the paper's form code for code, and what is promised of its result."""

import subprocess
import sys

import numpy as np
import oracles
import pytest
import torch
from core.checks import EXACT, STORAGES, array, check_solution, same_codes, solved
from core.problems import grid_options, problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.core.gptq import BEST, GPTQ, OPTIONS
from optq.core.grid import Storage
from optq.core.obq import OBQ
from optq.core.order import sweep_order
from optq.core.rtn import RTN
from optq.errors import NumericsError, SettingError

quick = settings(derandomize=True, deadline=None, max_examples=60)

SWEEPS = st.fixed_dictionaries(
    {
        "actorder": st.sampled_from((False, True, "group")),
        "static_groups": st.booleans(),
        "blocksize": st.sampled_from((1, 2, 5, 16, 32)),
    }
)
POLISHED = st.fixed_dictionaries({"polish": st.sampled_from((0, 0, 1, 3))})


def paper(p, options, d, follow):
    """``(codes, scales, sure, sweep)`` of the paper's form, row by row no worse than rounding."""
    W = p.W
    bits, sym = options["wbits"], options.get("sym", True)
    search = options.get("mse", False)
    sweep = oracles.gptq(
        W,
        p.H,
        d,
        bits,
        options.get("groupsize", -1),
        sym,
        options.get("actorder", False),
        options.get("static_groups", False),
        search,
        follow=follow,
    )
    importance = np.diag(p.H) if search else None
    scales, zeros, clear = oracles.fit_all(W, bits, sweep.g_idx, sym, importance)
    rounded = oracles.round_to_nearest(W, bits, scales, zeros, sweep.g_idx)
    codes, sure = oracles.never_worse(
        W,
        p.H,
        sweep.weight,
        oracles.dequantize(rounded, scales, zeros, sweep.g_idx),
        (sweep.codes, rounded),
    )
    # A row that took the rounded codes does not tell which way its sweep went at a tie.
    sure &= ~(sweep.tied & (follow == rounded).all(1)) & sweep.clear & clear
    return codes, np.minimum(np.abs(sweep.scales), np.abs(scales)), sure, sweep


def compare(p, options):
    W, H = p.tensors()
    solution = solved(GPTQ.plain(**options), W, H, EXACT)
    follow = solution.codes.numpy().astype(int)
    codes, scales, sure, sweep = paper(p, options, solution.problem.damp, follow)
    assert solution.g_idx.tolist() == sweep.g_idx.tolist()
    same_codes(solution, codes, scales, sure, p.W)
    return solution, sweep, sure


# ------------------------------------------------------------------------------ the paper's form


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("groupsize", [-1, 1, 8, 12, 64])
@pytest.mark.parametrize("actorder", [False, True, "group"])
@pytest.mark.parametrize("static_groups", [False, True])
def test_the_codes_are_those_of_the_paper_s_form(sym, groupsize, actorder, static_groups):
    """40 columns in blocks of 8: groups narrower, wider and ragged; most rows sure and swept."""
    options = {"wbits": 3, "groupsize": groupsize, "sym": sym, "actorder": actorder}
    options |= {"static_groups": static_groups, "blocksize": 8}
    p = problem(5, 40, seed=11)
    solution, sweep, sure = compare(p, options)
    assert sure.sum() >= 4
    if not solution.fell_back.any():
        np.testing.assert_allclose(solution.scales, sweep.scales, rtol=1e-9)
        np.testing.assert_array_equal(solution.zeros, sweep.zeros)


@quick
@given(problems(), grid_options(mse=(False,)), SWEEPS)
def test_the_codes_are_the_paper_s_for_any_weight_and_hessian(p, options, sweep):
    if (np.diag(p.H) == 0).all():
        return  # the paper has no form for that; below
    compare(p, options | sweep)


@settings(quick, max_examples=20)
@given(problems(weights=("normal", "positive"), max_rows=3), grid_options(mse=(True,)), SWEEPS)
def test_the_range_search_in_mid_sweep_sees_the_updated_weights(p, options, sweep):
    if (np.diag(p.H) == 0).all():
        return
    compare(p, options | sweep)


@pytest.mark.parametrize("options", [{}, {"actorder": True}, {"static_groups": True}])
@pytest.mark.parametrize("groupsize", [128, 48, -1])
def test_the_codes_are_the_paper_s_over_many_blocks(options, groupsize):
    """300 columns at the default block size: ranges halve several times."""
    options = {"wbits": 4, "groupsize": groupsize} | options
    solution, _, sure = compare(problem(3, 300, seed=13), options)
    assert sure.all() and not solution.fell_back.any()


def test_the_block_size_does_not_change_a_code():
    W, H = problem(6, 96, seed=17).tensors()
    one, *others = (
        solved(GPTQ.plain(4, 24, blocksize=b), W, H, EXACT) for b in (1, 7, 32, 96, 200)
    )
    for other in others:
        assert torch.equal(one.codes, other.codes)


# ---------------------------------------------------------------------------- what it reduces to


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("wbits", [2, 3, 4, 8])
def test_one_column_is_round_to_nearest(sym, wbits):
    W, H = problem(8, 1, seed=19).tensors()
    gptq, rtn = (solved(s(wbits, sym=sym), W, H, EXACT) for s in (GPTQ.plain, RTN))
    assert torch.equal(gptq.codes, rtn.codes) and torch.equal(gptq.scales, rtn.scales)


@pytest.mark.parametrize("groupsize", [-1, 8, 7])
@pytest.mark.parametrize("options", [{}, {"static_groups": True, "actorder": True}])
@pytest.mark.parametrize("sym", [True, False])
def test_a_diagonal_hessian_gives_round_to_nearest(groupsize, options, sym):
    W, H = problem(6, 40, "diagonal", seed=23).tensors()
    gptq = solved(GPTQ.plain(3, groupsize, sym, **options), W, H, EXACT)
    rtn = solved(RTN(3, groupsize, sym), W, H, EXACT)
    assert torch.equal(gptq.codes, rtn.codes) and torch.equal(gptq.scales, rtn.scales)
    torch.testing.assert_close(gptq.error, rtn.error)


def test_round_to_nearest_is_the_oracle_s():
    p = problem(5, 30, seed=29)
    for groupsize in (-1, 8):
        for sym in (True, False):
            solution = solved(RTN(4, groupsize, sym), *p.tensors(), EXACT)
            g_idx = oracles.group_index(30, groupsize)
            scales, zeros, _ = oracles.fit_all(p.W, 4, g_idx, sym)
            codes = oracles.round_to_nearest(p.W, 4, scales, zeros, g_idx)
            np.testing.assert_array_equal(solution.codes, codes)


# --------------------------------------------------------------------------------- order, groups


@pytest.mark.parametrize("groupsize", [-1, 16, 10])
@pytest.mark.parametrize("sym", [True, False])
def test_act_order_is_the_permuted_problem_with_its_columns_put_back(groupsize, sym):
    p = problem(6, 48, "outlier inputs", seed=31)
    W, H = p.tensors()
    order = torch.tensor(oracles.act_order(p.H))
    ordered = solved(GPTQ.plain(3, groupsize, sym, actorder=True), W, H, EXACT)
    direct = solved(GPTQ.plain(3, groupsize, sym), W[:, order], H[order][:, order], EXACT)
    assert torch.equal(ordered.codes[:, order], direct.codes)
    assert torch.equal(ordered.g_idx[order], direct.g_idx)
    assert torch.equal(ordered.scales, direct.scales)
    torch.testing.assert_close(ordered.error, direct.error)


def test_act_order_takes_columns_of_equal_weight_in_their_own_order():
    W = problem(3, 8, seed=37).tensors()[0]
    H = torch.diag(torch.tensor([1.0, 2, 1, 2, 1, 3, 1, 2], dtype=torch.float64))
    g_idx = solved(GPTQ.plain(4, 2, actorder=True), W, H, EXACT).g_idx
    assert g_idx.tolist() == [2, 0, 2, 1, 3, 0, 3, 1]


@pytest.mark.parametrize("actorder", [False, True])
def test_static_groups_keep_the_original_columns_and_grids(actorder):
    W, H = problem(4, 40, seed=41).tensors()
    solution = solved(GPTQ.plain(4, 16, actorder=actorder, static_groups=True), W, H, EXACT)
    assert solution.g_idx.tolist() == [k // 16 for k in range(40)]
    assert torch.equal(solution.scales, solved(RTN(4, 16), W, H, EXACT).scales)


def test_stacked_layers_are_solved_as_each_alone():
    W, H = problem(9, 40, seed=43).tensors()
    solver = GPTQ.plain(4, 16, actorder=True)
    parts = solved(solver, W, H, EXACT).split([2, 4, 3])
    for part, rows in zip(parts, W.split([2, 4, 3]), strict=True):
        alone = solved(solver, rows, H, EXACT)
        assert torch.equal(part.codes, alone.codes)
        torch.testing.assert_close(part.scales, alone.scales)
        torch.testing.assert_close(part.error, alone.error)


@pytest.mark.parametrize("groupsize", [16, 10, 1, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_group_order_is_the_permuted_problem_and_keeps_groups_in_place(groupsize, sym):
    p = problem(6, 48, "outlier inputs", seed=31)
    W, H = p.tensors()
    order = oracles.group_order(p.H, 48 if groupsize == -1 else groupsize)
    options = {"wbits": 3, "groupsize": groupsize, "sym": sym}
    ordered = solved(GPTQ.plain(actorder="group", **options), W, H, EXACT)
    direct = solved(GPTQ.plain(**options), W[:, order], H[order][:, order], EXACT)
    assert ordered.consecutive
    torch.testing.assert_close(ordered.weight[:, order], direct.weight)
    torch.testing.assert_close(ordered.error, direct.error)


def test_group_order_takes_loud_groups_first_and_a_shorter_one_last():
    diagonal = torch.tensor([1.0, 2, 3, 1, 1, 3, 2, 1, 9])
    assert sweep_order(diagonal, 2, "group").tolist() == [2, 3, 5, 4, 1, 0, 6, 7, 8]
    assert sweep_order(diagonal, 9, "group").tolist() == sweep_order(diagonal, 9, True).tolist()
    assert sweep_order(diagonal, 2, False) is None


# --------------------------------------------------------------------------------------- promises


@settings(quick, max_examples=100)
@given(
    problems(),
    grid_options(),
    SWEEPS,
    POLISHED,
    st.sampled_from(STORAGES),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from((0.0, 1e-6, 0.01, 0.1)),
)
def test_every_solution_keeps_its_promises(p, options, sweep, polish, storage, dtype, percdamp):
    solution = solved(
        GPTQ.plain(percdamp=percdamp, **options, **sweep, **polish), *p.tensors(dtype), storage
    )
    check_solution(solution, p, options, storage, dtype)


@quick
@given(problems(), grid_options(), SWEEPS, POLISHED, st.sampled_from((1e-6, 0.01, 1.0)))
def test_they_are_kept_where_errors_are_first_taken_in_bfloat16(p, grid, sweep, polish, percdamp):
    """As a GPU does, and a CPU with matrix units."""
    dtype = torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optq.core.precision.fast_bfloat16", lambda device: True)
        solution = solved(
            GPTQ.plain(percdamp=percdamp, **grid, **sweep, **polish), *p.tensors(dtype)
        )
    check_solution(solution, p, grid, Storage(), dtype)


@quick
@given(problems(), grid_options(), st.sampled_from(STORAGES))
def test_every_rounded_layer_keeps_them_too(p, options, storage):
    solution = solved(RTN(**options), *p.tensors(torch.float32), storage)
    check_solution(solution, p, options, storage, torch.float32)


@quick
@given(
    problems(), grid_options(), SWEEPS, POLISHED, st.booleans(), st.sampled_from((0.0, 0.01, 1.0))
)
def test_they_are_kept_of_the_weight_where_another_target_is_aimed_at(
    p, options, sweep, polish, bfloat16, drift
):
    """As under error propagation, with targets near and far."""
    W, H = p.tensors(torch.float32)
    shift = torch.randn(W.shape, generator=torch.Generator().manual_seed(1)) * W.abs().mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optq.core.precision.fast_bfloat16", lambda device: bfloat16)
        solver = GPTQ.plain(**options, **sweep, **polish)
        solution = solved(solver, W, H, Storage(), W + drift * shift)
    check_solution(solution, p, options, Storage(), torch.float32)


@pytest.mark.parametrize("groupsize", [64, -1])
@pytest.mark.parametrize("shift", [0.0, 0.03, 0.1])
def test_they_are_kept_where_inputs_are_alike(groupsize, shift, monkeypatch):
    """Each half of the columns reads the same noisy copy of one factor: entries of ``H`` are alike,
    so bfloat16 rounds them alike, and a target that differs between the halves costs what it hides.
    """
    monkeypatch.setattr("optq.core.precision.fast_bfloat16", lambda device: True)
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(4000, 1, generator=generator)
    copies = common + 0.04 * torch.randn(4000, 2, generator=generator)
    x = copies.repeat_interleave(128, 1) + 0.01 * torch.randn(4000, 256, generator=generator)
    W, H = torch.randn(200, 256, generator=generator), x.T @ x / 4000
    halves = torch.tensor([1.0, -1.0]).repeat_interleave(128)
    solver = GPTQ(4, groupsize)
    solution = solved(solver, W, H, Storage(), W + shift * halves)
    true = oracles.row_errors(array(W), array(solution.weight), array(H))
    np.testing.assert_allclose(array(solution.error), true, rtol=0.02, atol=1e-5)
    rounded = solved(RTN(4, groupsize, mse=True), W, H, Storage())
    most = oracles.row_errors(array(W), array(rounded.weight), array(H))
    assert (true <= most * 1.02 + 1e-5).all()


@pytest.mark.parametrize(
    "solver", [RTN(3, 16), OBQ(3, 16), GPTQ.plain(3, 16), GPTQ.plain(3, 16, static_groups=True)]
)
def test_the_codes_are_those_of_the_target(solver):
    """Where rounding the weight itself is no better; on grids that are the same for both."""
    p = problem(12, 48, seed=71)
    W, H = p.tensors()
    target = W + 0.02 * torch.randn(W.shape, generator=torch.Generator().manual_seed(2))
    W, target = W.clamp(-3, 3), target.clamp(-3, 3)
    target[:, ::16] = W[:, ::16] = 4.0  # the largest of each group, which make its grid
    solution, direct = solved(solver, W, H, EXACT, target), solved(solver, target, H, EXACT)
    kept = (solution.codes == direct.codes).all(1)
    rounded = (solution.codes == solved(RTN(3, 16), W, H, EXACT).codes).all(1)
    assert kept.sum() > 2 and rounded.sum() >= solution.fell_back.sum()
    # `direct` has promises of its own to keep.
    lost = (direct.codes == solved(RTN(3, 16), target, H, EXACT).codes).all(1)
    assert (kept | rounded | lost).all()


@pytest.mark.parametrize("solver", [RTN(3, 16), OBQ(3, 16), GPTQ(3, 16), GPTQ(4, sym=False)])
def test_a_target_that_is_the_weight_changes_nothing(solver):
    W, H = problem(8, 48, seed=73).tensors()
    aimed, plain = solved(solver, W, H, EXACT, W), solved(solver, W, H, EXACT)
    assert torch.equal(aimed.codes, plain.codes) and torch.equal(aimed.scales, plain.scales)
    torch.testing.assert_close(aimed.error, plain.error)


def losing(seed):
    """A problem of 12 columns and two bits, the oracle's sweep, rounding, and which rows lose."""
    p = problem(40, 12, seed=seed)
    solution = solved(GPTQ.plain(2, sym=False), *p.tensors(), EXACT)
    rtn = solved(RTN(2, sym=False), *p.tensors(), EXACT)
    sweep = oracles.gptq(p.W, p.H, solution.problem.damp, 2, sym=False)
    lost = oracles.row_errors(p.W, sweep.weight, p.H) > rtn.error.numpy() * (1 + 1e-9)
    assert 0 < lost.sum() < 40
    return solution, sweep, rtn, torch.tensor(lost)


def test_rows_where_the_sweep_loses_are_the_rounded_rows():
    solution, sweep, rtn, lost = losing(47)
    assert torch.equal(solution.codes[lost], rtn.codes[lost])
    assert torch.equal(solution.scales[lost], rtn.scales[lost])
    assert torch.equal(solution.error[lost], solution.rtn_error[lost])
    np.testing.assert_array_equal(solution.codes[~lost], sweep.codes[~lost])


def test_only_rows_where_rounding_was_better_are_counted_as_fallen_back():
    solution, _, _, lost = losing(47)
    assert torch.equal(solution.fell_back, lost)


@pytest.mark.parametrize("options", [{}, {"actorder": True}, {"groupsize": 16, "sym": False}])
def test_the_error_is_well_below_round_to_nearest_s(options):
    solution = solved(GPTQ.plain(3, **options), *problem(16, 64, seed=53).tensors(torch.float32))
    assert solution.error.sum() < 0.7 * solution.rtn_error.sum()


def test_float32_gives_nearly_the_codes_of_float64():
    p = problem(16, 64, seed=59)
    single, double = (
        solved(GPTQ.plain(4, 16), *p.tensors(dtype), Storage())
        for dtype in (torch.float32, torch.float64)
    )
    assert (single.codes == double.codes).double().mean() > 0.98
    torch.testing.assert_close(single.error.sum().double(), double.error.sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_solved_as_their_float32_values(dtype):
    W, H = problem(4, 32, seed=61).tensors(torch.float32)
    W = W.to(dtype)
    half, single = solved(GPTQ.plain(4, 8), W, H), solved(GPTQ.plain(4, 8), W.float(), H)
    assert torch.equal(half.codes, single.codes) and torch.equal(half.scales, single.scales)


@pytest.mark.parametrize("options", [{}, {"actorder": True}, {"static_groups": True}])
def test_a_column_that_no_token_reached_is_rounded(options):
    """No evidence is not a zero: another text may reach it."""
    p = problem(4, 24, "dead columns", seed=67)
    W, H = p.tensors()
    dead = H.diagonal() == 0
    assert 0 < dead.sum() < 24
    for solver in (GPTQ.plain(4, 8, sym=False, **options), OBQ(4, 8, sym=False), RTN(4, 8)):
        solution = solved(solver, W, H)
        assert torch.equal(solution.problem.dead, dead)
        scale = solution.scales[:, solution.g_idx.long()]
        miss = (solution.weight - W)[:, dead].abs()
        # Dynamic groups are fitted on weights that moved, and may clip by as much.
        assert (miss <= scale[:, dead].abs() / 2 * (1 + 1e-9)).double().mean() > 0.9
        assert (solution.weight[:, dead] != 0).double().mean() > 0.7


def test_a_range_search_gives_columns_without_evidence_a_small_say():
    """Alone in a group they are all alike; beside others they have little to say."""
    W = torch.tensor([[4.0, -3.0, 2.0, 1.0, 9.0, -9.0, 3.0, 1.0]])
    H = torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    alone, alike = (solved(RTN(4, 4, mse=True), W, each) for each in (H, torch.eye(8)))
    assert torch.equal(alone.scales, alike.scales)
    beside = solved(RTN(4, 8, mse=True), W, H)
    assert beside.error < solved(RTN(4, 8), W, H).error


@pytest.mark.parametrize(
    "solver", [GPTQ.plain(4, 8), GPTQ.plain(4, 8, actorder=True), RTN(4, 8, mse=True)]
)
def test_a_hessian_of_zeros_gives_round_to_nearest(solver):
    """No input was ever anything but zero: nothing is known of any column."""
    W = problem(3, 20).tensors()[0]
    solution = solved(solver, W, torch.zeros(20, 20, dtype=torch.float64))
    rounded = solved(RTN(4, 8), W, torch.eye(20, dtype=torch.float64))
    assert solution.problem.dead.all() and (solution.error == 0).all()
    assert torch.equal(solution.weight, rounded.weight)


def test_the_damping_that_was_used_is_reported():
    p = problem(2, 16, seed=71)
    solution = solved(GPTQ.plain(4, percdamp=0.05), *p.tensors())
    assert solution.problem.damp == pytest.approx(0.05 * np.diag(p.H).mean())


def test_a_hessian_that_needed_more_damping_says_so():
    """A negative eigenvalue of a twentieth of the mean diagonal, as rounding leaves them."""
    W, H = problem(3, 16, seed=73).tensors()
    values, vectors = torch.linalg.eigh(H)
    values[0] = -0.05 * H.diagonal().mean()
    H = vectors * values @ vectors.T
    solution = solved(GPTQ.plain(4), W, H)
    assert solution.problem.damp == pytest.approx(0.1 * H.diagonal().mean().item())
    assert torch.isfinite(solution.error).all()


def test_a_hessian_with_a_nan_is_an_error():
    W, H = problem(2, 8).tensors()
    H[1, 1] = float("nan")
    with pytest.raises(NumericsError):
        solved(GPTQ.plain(4), W, H)


@pytest.mark.parametrize("options", [{}, {"actorder": True}])
def test_solving_twice_gives_the_same_bits_and_leaves_its_inputs_alone(options):
    W, H = problem(8, 64, "dead columns", seed=79).tensors(torch.float32)
    before = W.clone(), H.clone()
    first, second = (solved(GPTQ.plain(4, 16, **options), W, H) for _ in range(2))
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])
    for name in ("codes", "scales", "zeros", "g_idx", "error"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_a_layout_that_is_not_contiguous_gives_the_same_codes():
    W, H = problem(8, 32, seed=83).tensors()
    assert torch.equal(
        solved(GPTQ.plain(4, 8), W.T.contiguous().T, H, EXACT).codes,
        solved(GPTQ.plain(4, 8), W, H, EXACT).codes,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"wbits": 5},
        {"groupsize": 0},
        {"percdamp": -0.1},
        {"percdamp": float("nan")},
        {"blocksize": 0},
        {"polish": -1},
        {"actorder": "falling"},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(SettingError):
        GPTQ.plain(**({"wbits": 4} | options))


def test_options_of_another_type_are_refused_when_they_are_made():
    """In a process of its own: here, shapes and types are checked before OPTQ sees them."""
    wrong = {
        "wbits": 4.0,
        "groupsize": 128.0,
        "sym": "yes",
        "mse": 1,
        "static_groups": "no",
        "blocksize": 64.0,
        "polish": True,
        "percdamp": "0.01",
        "actorder": 1,
    }
    program = f"""
from optq import GPTQ, OBQ, RTN
from optq.errors import SettingError
for solver, names in (GPTQ, {[*wrong]}), (RTN, {[*wrong][:4]}), (OBQ, {[*wrong][:4]}):
    for name in names:
        try:
            solver(**{{"wbits": 4, name: {wrong}[name]}})
        except SettingError as error:
            assert name in error.cause, error
        else:
            raise AssertionError((solver, name))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ------------------------------------------------------------------------------------ defaults


@pytest.mark.parametrize("wbits", [2, 3, 4, 8])
def test_what_is_left_out_is_the_best_known(wbits):
    chosen = {name: getattr(GPTQ(wbits), name) for name in OPTIONS}
    assert chosen == {name: getattr(BEST[wbits], name) for name in OPTIONS}
    paper = {name: getattr(GPTQ.plain(wbits), name) for name in OPTIONS}
    assert paper == {"actorder": False, "static_groups": False, "mse": False, "polish": 0}
    for name, value in (("actorder", True), ("static_groups", True), ("mse", False), ("polish", 1)):
        changed = {other: getattr(GPTQ(wbits, **{name: value}), other) for other in OPTIONS}
        assert changed == {**chosen, name: value}
    W, H = problem(8, 64, seed=3).tensors()
    best, plain = solved(GPTQ(wbits, 32), W, H, EXACT), solved(GPTQ.plain(wbits, 32), W, H, EXACT)
    assert best.error.sum() < plain.error.sum()
    assert torch.equal(best.g_idx, torch.arange(64, dtype=torch.int32) // 32)  # nothing to pay
