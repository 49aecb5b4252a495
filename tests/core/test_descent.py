"""Descent on codes and scales: against plain loops, and its promise that no row gets worse."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from core.checks import EXACT, STORAGES, rounding_bound, solved
from core.problems import grid_options, problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.core import descent
from optq.core.descent import polish
from optq.core.error import undamped_error
from optq.core.gptq import GPTQ
from optq.core.grid import Storage
from optq.core.problem import Problem
from optq.core.rtn import RTN

quick = settings(derandomize=True, deadline=None, max_examples=60)


def realistic(rows=48, cols=256, seed=0):
    """Inputs whose variance decays along a few hundred directions, as a layer's do, in float32."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols // 4, generator=generator) * torch.logspace(0, -2, cols // 4)
    H = mix @ mix.T / mix.square().sum() * cols + 0.05 * torch.eye(cols)
    size = torch.exp(0.5 * torch.randn(cols, generator=generator))
    return torch.randn(rows, cols, generator=generator), H * size * size[:, None]


def errors(p, weight):
    codes, zeros = weight.codes.numpy().astype(int), weight.zeros.numpy().astype(int)
    Q = oracles.dequantize(codes, weight.scales.double().numpy(), zeros, weight.g_idx.numpy())
    return oracles.row_errors(p.W, Q, p.H), Q


def polished_from(W, H, start, storage=Storage(), rounds=1):
    """``start`` may have been solved for another weight: its error is taken anew."""
    miss = (W - start.weight).T.contiguous()
    start = replace(start, error=undamped_error(miss, H))
    return polish(W, Problem(H), start, storage, rounds), start


# ------------------------------------------------------------------------------------ the oracle


def best_step(gradient, curve, scale, code, bits):
    """``(step, gain)``: the change of one code that lowers ``e^T H e`` most, all codes tried.

    ``gradient`` is ``(H e)_j``, ``curve`` is ``H_jj``, and ``e = w - q`` falls by ``step * scale``.
    """
    gains = []
    for new in range(2**bits):
        move = (new - code) * scale
        gains.append(2 * move * gradient - move**2 * curve)
    new = max(range(2**bits), key=lambda c: (gains[c], -abs(c - code)))
    return new - code, gains[new]


def descend(w, H, codes, scales, zeros, bits, size, rounds, block, neighbours, passes, ridge):
    """Descent on the codes and scales of one row: ``(codes, scales)``.

    Groups are ``size`` consecutive columns. Blocks of ``block`` columns, or of one group where that
    is narrower, are visited in order; a visit goes over the block ``passes`` times: the scale of a
    narrow group moves by least squares, then of each ``neighbours`` columns the code that gains
    most. The scale of a wide group moves once, ahead of its blocks.
    """
    codes, scales = np.array(codes), np.array(scales, dtype=float)
    cols = len(w)
    g_idx = np.array([k // size for k in range(cols)])

    def miss():
        return w - np.array([scales[g] * (c - zeros[g]) for c, g in zip(codes, g_idx, strict=True)])

    def move_scale(g):
        t = np.where(g_idx == g, codes - zeros[g], 0.0)
        slope, bend = t @ H @ miss(), t @ H @ t
        change = slope / (bend + ridge * np.mean(np.diag(H)[g_idx == g]) * (t @ t))
        if change * (2 * slope - change * bend) > 0 and (scales[g] + change) * scales[g] > 0:
            scales[g] += change

    for _ in range(rounds):
        for g in range(max(g_idx) + 1):
            first, last = g * size, min((g + 1) * size, cols)
            if size > block:
                move_scale(g)
            for start in range(first, last, block):
                stop = min(start + block, last)
                for _ in range(passes):
                    if size <= block:
                        move_scale(g)
                    for left in range(start, stop, neighbours):
                        some = range(left, min(left + neighbours, stop))
                        gradient = H @ miss()
                        steps = [
                            best_step(gradient[j], H[j, j], scales[g], codes[j], bits) for j in some
                        ]
                        k = max(range(len(steps)), key=lambda k: steps[k][1])
                        codes[left + k] += steps[k][0]
    return codes, scales


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("wbits", [2, 3, 4])
@pytest.mark.parametrize("groupsize", [-1, 8, 6, 20])
def test_the_rounds_are_the_oracle_s(monkeypatch, groupsize, wbits, sym):
    """44 columns in blocks of 8: groups narrower, wider, as wide, and ragged ones."""
    monkeypatch.setattr(descent, "BLOCK", 8)
    monkeypatch.setattr(descent, "STEP_COLUMNS", 4)
    p = problem(5, 44, seed=3)
    W, H = p.tensors()
    start = solved(GPTQ.plain(wbits, groupsize, sym, mse=True), W, H, EXACT)
    size = 44 if groupsize == -1 else groupsize
    for rounds in (1, 2):
        found, _ = polished_from(W, H, start, EXACT, rounds)
        for n in range(5):
            codes, scales = descend(
                p.W[n],
                p.H,
                start.codes[n].numpy().astype(int),
                start.scales[n].numpy(),
                start.zeros[n].numpy().astype(int),
                wbits,
                size,
                rounds,
                block=8,
                neighbours=4,
                passes=descent.PASSES,
                ridge=descent.RIDGE,
            )
            np.testing.assert_array_equal(found.codes[n], codes)
            np.testing.assert_allclose(found.scales[n], scales, rtol=1e-9)


def test_groups_out_of_order_are_those_of_the_ordered_columns():
    W, H = problem(6, 48, seed=5).tensors()
    start = solved(GPTQ.plain(3, 16, actorder=True), W, H, EXACT)
    order = torch.argsort(start.g_idx, stable=True)
    assert not start.consecutive
    ordered = replace(start, codes=start.codes[:, order], g_idx=start.g_idx[order])
    one, _ = polished_from(W, H, start, EXACT, 2)
    other, _ = polished_from(W[:, order], H[order][:, order], ordered, EXACT, 2)
    assert torch.equal(one.codes[:, order], other.codes)
    assert torch.equal(one.scales, other.scales)
    assert torch.equal(one.g_idx, start.g_idx)


def test_rows_at_work_together_are_polished_as_each_alone(monkeypatch):
    W, H = problem(7, 40, seed=7).tensors()
    start = solved(RTN(3, 8), W, H, EXACT)
    together, _ = polished_from(W, H, start, EXACT, 2)
    monkeypatch.setattr(descent, "ROWS_AT_ONCE", 3)
    apart, _ = polished_from(W, H, start, EXACT, 2)
    assert torch.equal(apart.codes, together.codes)
    torch.testing.assert_close(apart.error, together.error)


def test_the_error_is_the_quadratic_form():
    p = problem(3, 700, seed=11)
    found = undamped_error(*(x.T.contiguous() if i == 0 else x for i, x in enumerate(p.tensors())))
    expected = oracles.row_errors(p.W, np.zeros_like(p.W), p.H)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


# --------------------------------------------------------------------------------------- promises


@settings(quick, max_examples=120)
@given(
    problems(max_cols=40),
    grid_options(),
    st.sampled_from(STORAGES),
    st.sampled_from((torch.float32, torch.float64)),
    st.integers(1, 3),
    st.booleans(),
)
def test_no_row_ever_gets_worse(p, options, storage, dtype, rounds, bfloat16):
    W, H = p.tensors(dtype)
    start = solved(RTN(**options), W, H, storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optq.core.precision.fast_bfloat16", lambda device: bfloat16)
        found, _ = polished_from(W, H, start, storage, rounds)
    (before, old), (after, new) = errors(p, start), errors(p, found)
    bound = rounding_bound(p.W, old, p.H, 0, dtype) + rounding_bound(p.W, new, p.H, 0, dtype)
    assert (after <= before + bound).all()
    assert (np.abs(after - found.error.double().numpy()) <= bound).all()
    assert torch.isfinite(found.scales).all() and (found.scales * start.scales > 0).all()
    for stored in storage.scale_dtypes:
        assert torch.equal(found.scales.to(stored).to(dtype), found.scales)
    assert int(found.codes.max()) < 2 ** options["wbits"]
    assert torch.equal(found.zeros, start.zeros) and torch.equal(found.g_idx, start.g_idx)


def test_a_column_without_evidence_keeps_the_nearest_code_when_its_scale_moves():
    """With scales of full precision, whose multiples are not exact."""
    moved = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 160, generator=generator)
        x[::3] = 0
        W, H = torch.randn(4, 40, generator=generator), x @ x.T / 160
        for sym in (True, False):
            start = solved(GPTQ.plain(3, 8, sym), W, H, EXACT)
            polished, _ = polished_from(W, H, start, EXACT, 2)
            scale, zero = (
                each[:, start.g_idx.long()] for each in (polished.scales, polished.zeros)
            )
            nearest = ((W / scale).round() + zero).clamp(0, 7)
            assert torch.equal(polished.codes[:, ::3], nearest[:, ::3].to(torch.uint8))
            moved += int((polished.scales != start.scales).sum())
    assert moved > 50


def test_a_row_that_did_not_gain_keeps_its_codes_and_scales():
    """Each code and each scale is at its best already: nothing may move, not by a bit."""
    W, H = problem(8, 24, seed=13).tensors()
    first, _ = polished_from(W, H, solved(RTN(4, 8), W, H), rounds=60)
    second = polish(W, Problem(H), first)
    still = second.error == first.error
    assert still.sum() >= 6
    assert torch.equal(second.codes[still], first.codes[still])
    assert torch.equal(second.scales[still], first.scales[still])


@pytest.mark.parametrize(("rows", "groupsize"), [(16, 16), (16, -1), (1, 16)])
def test_a_gradient_of_noise_changes_nothing(monkeypatch, rows, groupsize):
    """The final check is exact, whatever the rounds were misled by."""
    W, H = realistic(rows, 64)
    start = solved(GPTQ.plain(4, groupsize), W, H)
    scales = start.scales.clone()
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * H.diagonal().max()
    monkeypatch.setattr("optq.core.precision.fast_bfloat16", lambda device: True)
    build = descent._Descent.__init__

    def misled(self, *arguments):
        build(self, *arguments)
        self.H_quick = (H + noise).bfloat16()

    monkeypatch.setattr(descent._Descent, "__init__", misled)
    polished, _ = polished_from(W, H, start)
    assert (polished.error <= start.error * (1 + 1e-4)).all()
    assert torch.equal(polished.codes, start.codes)
    assert torch.equal(polished.scales, scales) and torch.equal(start.scales, scales)


def test_duplicated_inputs_do_not_all_make_up_for_the_same_error():
    W, H = problem(6, 32, "duplicates", seed=17).tensors()
    start = solved(RTN(3, 8), W, H, EXACT)
    polished, _ = polished_from(W, H, start, EXACT)
    assert polished.error.sum() < 0.8 * start.error.sum()


@pytest.mark.parametrize(("wbits", "least"), [(2, 0.2), (3, 0.1), (4, 0.1)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_layer_error_falls(monkeypatch, wbits, least, bfloat16):
    monkeypatch.setattr("optq.core.precision.fast_bfloat16", lambda device: bfloat16)
    W, H = realistic()
    plain, polished = (solved(GPTQ.plain(wbits, 128, polish=n), W, H) for n in (0, 2))
    assert 1 - polished.error.sum() / plain.error.sum() > least
    assert torch.equal(polished.rtn_error, plain.rtn_error)


def test_more_rounds_do_not_lose():
    W, H = (x.double() for x in realistic())
    start = solved(GPTQ.plain(3, 64), W, H)
    one, two, four = (polished_from(W, H, start, rounds=n)[0].error.sum() for n in (1, 2, 4))
    assert start.error.sum() > one > two > four


def test_any_target_may_be_aimed_at():
    """As error propagation does: the weight was solved for another one."""
    p = problem(5, 40, seed=19)
    W, H = p.tensors()
    start = solved(GPTQ.plain(4, 8), W + 0.1 * torch.randn_like(W), H)
    polished, start = polished_from(W, H, start, rounds=3)
    (before, _), (after, _) = errors(p, start), errors(p, polished)
    np.testing.assert_allclose(polished.error, after, rtol=1e-9)
    assert after.sum() < 0.7 * before.sum()


def test_polishing_twice_gives_the_same_bits_and_leaves_its_inputs_alone():
    W, H = realistic()
    start = solved(GPTQ.plain(3, 64), W, H)
    before = W.clone(), H.clone(), start.codes.clone(), start.scales.clone(), start.error.clone()
    first, second = (polish(W, Problem(H), start, Storage(), 2) for _ in range(2))
    for old, now in zip(before, (W, H, start.codes, start.scales, start.error), strict=True):
        assert torch.equal(old, now)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    assert torch.equal(first.error, second.error)
