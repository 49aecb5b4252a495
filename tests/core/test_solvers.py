"""What every solver does with every grid, its own or another: one row each.

The grid of a test is a codebook of four values, which no integers give: whoever takes it through a
solver finds out what the solver still knows of integers.
"""

from dataclasses import dataclass, replace

import numpy as np
import oracles
import pytest
import torch
from core.checks import EXACT, array, solved
from core.problems import problem

from optq.core.gptq import GPTQ
from optq.core.grid import Grid, Storage
from optq.core.methods import METHODS
from optq.core.obq import OBQ
from optq.core.order import sweep_order
from optq.core.problem import Problem
from optq.core.rtn import RTN
from optq.core.smoothquant import SmoothQuant
from optq.core.solution import Solution
from optq.core.weight import LayerScheme

LEVELS = torch.tensor([-1.0, -0.25, 0.4, 1.0], dtype=torch.float64)


@dataclass(frozen=True)
class Codebook(Grid):
    """Four values times a scale: the largest weight of the group."""

    groupsize: int
    wbits: int = 2

    def fit(self, group, storage, importance=None, near=None):
        scale = storage.round(group.abs().amax(0).clamp(min=1e-30))
        return scale, torch.zeros_like(scale)

    def snapping(self, zero):
        def snap(units):
            places = (LEVELS[1:] + LEVELS[:-1]) / 2
            return units.copy_(LEVELS[torch.bucketize(units.double(), places)])

        return snap

    def code(self, units, zero):
        return torch.bucketize(units.double(), LEVELS - 1e-6, right=True).sub(1).to(torch.uint8)

    def units(self, code, zero):
        return LEVELS.to(zero.dtype)[code.long()]


def on_codebook(solver):
    """The same solver on the other grid."""
    grid = property(lambda self: Codebook(self.groupsize))
    made = type(f"Codebook{type(solver).__name__}", (type(solver),), {"grid": grid})
    return made(**{name: getattr(solver, name) for name in solver.__dataclass_fields__})


OWN = [
    RTN(2, 8),
    RTN(3, -1, mse=True),
    OBQ(2, 8),
    GPTQ.plain(2, 8),
    GPTQ.plain(2, 8, actorder=True, static_groups=True),
    GPTQ.plain(2, -1),
    GPTQ(2, 8),
]
ROWS = [*OWN, *map(on_codebook, OWN)]


def short(solver):
    """A name for a row: the options that are not the default."""
    fields = solver.__dataclass_fields__.values()
    options = [f"{f.name}={getattr(solver, f.name)}" for f in fields if f.name != "blocksize"]
    return f"{type(solver).__name__}-{'-'.join(options)}"


def of_each_weight(solution):
    """Scale and zero point of every weight."""
    group = solution.g_idx.long()
    return solution.scales[:, group], solution.zeros[:, group].to(solution.scales.dtype)


@pytest.mark.parametrize("solver", ROWS, ids=short)
@pytest.mark.parametrize("kind", ["correlated", "dead columns", "few tokens"])
def test_the_promises_hold_on_every_grid(solver, kind):
    p = problem(9, 32, kind, seed=3)
    W, H = p.tensors()
    shift = 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    dead = H.diagonal() == 0
    for aim in (None, torch.where(dead, W, W + shift)):
        solution = solved(solver, W, H, EXACT, aim)
        scales, zeros = of_each_weight(solution)
        Q = solution.grid.decode(solution.codes, scales, zeros)
        assert torch.equal(solution.weight, Q)
        error = oracles.row_errors(p.W, array(Q), p.H)
        np.testing.assert_allclose(array(solution.error), error, rtol=1e-6, atol=1e-9)
        assert (solution.error <= solution.rtn_error * (1 + 1e-9) + 1e-12).all()
        _, nearest = solution.grid.nearest(W, scales, zeros)
        torch.testing.assert_close(Q[:, dead], nearest[:, dead])


TOGETHER = [
    *ROWS,
    GPTQ.plain(4, 8, actorder=True),
    GPTQ.plain(3, 8, sym=False, actorder="group", mse=True),
    GPTQ(3, 8, static_groups=True),
    GPTQ(2, -1, actorder=True, blocksize=5),
]


@pytest.mark.parametrize("solver", TOGETHER, ids=short)
def test_experts_solved_together_get_what_each_gets_alone(solver):
    kinds = ("correlated", "dead columns", "few tokens")
    each = [problem(9, 36, kind, seed=seed).tensors() for seed, kind in enumerate(kinds)]
    generator = torch.Generator().manual_seed(5)
    for shifted in (False, True):
        aims = [
            W + 0.1 * torch.randn(W.shape, generator=generator).double() if shifted else None
            for W, _ in each
        ]
        weights = [W for W, _ in each]
        alone = [
            solver.solve(solver.problem(H), W, aim, EXACT)
            for (W, H), aim in zip(each, aims, strict=True)
        ]
        problems = [solver.problem(H) for _, H in each]
        together = solver.solve_together(problems, weights, aims, EXACT)
        for one, other in zip(alone, together, strict=True):
            for name in ("codes", "zeros", "g_idx", "fell_back"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            for name in ("scales", "error", "rtn_error"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("solver", ROWS, ids=short)
def test_a_diagonal_hessian_gives_the_nearest_values(solver):
    """Nothing is to be made up for: whatever the order, each weight is the nearest of its grid."""
    W, H = problem(6, 24, "diagonal", seed=5).tensors()
    if getattr(solver, "polish", 0):
        solver = replace(solver, polish=0)
    solution = solved(solver, W, H, EXACT)
    _, nearest = solution.grid.nearest(W, *of_each_weight(solution))
    torch.testing.assert_close(solution.weight, nearest)


@pytest.mark.parametrize("options", [{}, {"actorder": True, "static_groups": True}])
def test_on_a_codebook_too_the_codes_are_the_paper_s(options):
    """The paper's form with the inverse, in plain loops, on scales fitted beforehand."""
    p = problem(8, 24, seed=7)
    solver = on_codebook(GPTQ.plain(2, -1, **options))
    W, H = p.tensors()
    solution = solved(solver, W, H, EXACT)
    order = sweep_order(H.diagonal(), 24, bool(options))
    order = np.arange(24) if order is None else order.numpy()
    D = p.H[np.ix_(order, order)] + solution.problem.damp * np.eye(24)
    R = np.linalg.cholesky(np.linalg.inv(D)).T
    w, scale, levels = p.W[:, order].copy(), np.abs(p.W).max(1), LEVELS.numpy()
    Q = np.empty_like(w)
    for j in range(24):
        nearest = np.abs(w[:, j, None] / scale[:, None] - levels).argmin(1)
        Q[:, j] = scale * levels[nearest]
        w[:, j:] -= np.outer((w[:, j] - Q[:, j]) / R[j, j], R[j, j:])
    swept = ~solution.fell_back.numpy()
    assert swept.sum() >= 6
    np.testing.assert_allclose(array(solution.weight)[swept][:, order], Q[swept], rtol=1e-12)


@pytest.mark.parametrize("method", [OBQ(2, 8), GPTQ.plain(2, 8), GPTQ(2, 8)], ids=short)
def test_on_a_codebook_too_the_error_is_below_rounding_s(method):
    W, H = problem(16, 64, seed=9).tensors()
    solution = solved(on_codebook(method), W, H, EXACT)
    assert solution.error.sum() < 0.75 * solution.rtn_error.sum()


@pytest.mark.parametrize("solver", ROWS, ids=short)
def test_split_and_cat_are_inverses(solver):
    """And what belongs to a layer is the layer's own: which rows fell back, and their errors."""
    W, H = problem(9, 16, seed=11).tensors()
    whole = solved(solver, W, H, Storage())
    parts = whole.split([2, 4, 3])
    assert [part.rows for part in parts] == [2, 4, 3]
    assert sum(int(part.fell_back.sum()) for part in parts) == int(whole.fell_back.sum())
    back = Solution.cat(parts)
    for name in ("codes", "scales", "zeros", "g_idx", "error", "rtn_error", "fell_back"):
        assert torch.equal(getattr(back, name), getattr(whole, name))
    assert torch.equal(back.weight, whole.weight)


def test_each_layer_of_a_site_counts_its_own_rows():
    """Of two layers, one whose rows rounding serves best and one that the sweep improves."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    H = problem(40, 12, seed=47).tensors()[1]
    fell = solved(GPTQ.plain(2, sym=False), problem(40, 12, seed=47).tensors()[0], H, EXACT)
    swept = solved(GPTQ.plain(2, sym=False), W, H, EXACT)
    both = Solution.cat([fell, swept]).split([40, 8])
    assert [int(part.fell_back.sum()) for part in both] == [
        int(fell.fell_back.sum()),
        int(swept.fell_back.sum()),
    ]
    assert fell.fell_back.any()


def test_a_problem_is_made_once():
    H = problem(1, 24, "dead columns", seed=13).tensors()[1]
    p = Problem(H, 0.01, actorder=True)
    assert p.damp == 0 and p.damp_tries == 0  # nothing was factored yet
    assert p.factor is p.factor and p.order is p.order
    assert p.damp == pytest.approx(0.01 * H.diagonal().mean().item())
    assert torch.equal(p.order[p.places], torch.arange(24))
    assert torch.equal(p.dead, H.diagonal() == 0)
    assert p.factor_at(0.01)[0] is p.factor and p.factor_at(0.1)[0] is not p.factor


def test_every_method_is_a_solver_with_a_scheme():
    for name, method in METHODS.items():
        assert method.__name__.lower() == name
        if method is SmoothQuant:
            assert method(8).scheme() == LayerScheme(8, -1, True, abits=8)
            continue
        assert method(3, 32, False).scheme() == LayerScheme(3, 32, False)
    assert GPTQ.plain(4, 32, actorder=True).scheme().actorder
    assert not GPTQ.plain(4, -1, actorder=True).scheme().actorder
    assert not GPTQ(4, 32, actorder=True, static_groups=True).scheme().actorder
