"""A row is solved to the same bits with any other rows, and on any number of threads.

So rows can be split over processes, and a checkpoint does not depend on how many there are.
"""

import pytest
import torch

from optq import GPTQ, OBQ, QEP, RTN
from optq.core.error import output_energy
from optq.core.hessian import Chunks, Hessian, add_drift
from optq.core.problem import factor
from optq.core.solution import BY_ROW, Solution
from optq.ranks import UNIT, Ranks

SOLVERS = {
    "default": GPTQ(4, 128),
    "2 bits": GPTQ(2, 64, sym=False),
    "one group": GPTQ(3, -1, sym=False),
    "plain": GPTQ.plain(4, 128),
    "act-order": GPTQ.plain(3, 128, actorder=True),
    "static": GPTQ.plain(4, 128, actorder=True, static_groups=True),
    "rtn": RTN(4, 128, mse=True),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def site(columns, rows):
    """Weights, Hessian and drift of one site."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(columns + 300, columns, generator=generator)
    x *= torch.exp(0.5 * torch.randn(columns, generator=generator))
    drift = 0.01 * torch.randn(len(x), columns, generator=generator)
    W = torch.randn(rows, columns, generator=generator).bfloat16()
    return W, x.T @ x / len(x), drift.T @ x / len(x)


def same(solution, other):
    return [n for n in BY_ROW if not torch.equal(getattr(solution, n), getattr(other, n))]


@pytest.mark.parametrize(
    ("name", "aimed"), [(name, index % 2 == 0) for index, name in enumerate(SOLVERS)]
)
def test_rows_do_not_depend_on_other_rows_or_threads(name, aimed, threads):
    (W, H, drift), solver = site(512, 200), SOLVERS[name]

    def solve(rows):
        problem = solver.problem(H)
        aim = None
        if aimed:
            aim = QEP().correct(problem, W[rows].float(), drift, of=len(W))
        solution = solver.solve(problem, W[rows], aim)
        return solution, output_energy(W[rows], H)

    whole, energy = solve(slice(None))
    for some, ranks in ((1, 3), (2, 2)):
        threads(some)
        parts = [solve(rows) for rows in Ranks(0, ranks).bounds(len(W), UNIT)]
        assert same(whole, Solution.cat([part for part, _ in parts])) == []
        assert torch.equal(energy, torch.cat([each for _, each in parts]))


def test_obq_too(threads):
    W, H, _ = site(32, 130)
    solver = OBQ(3, 16)
    whole = solver.solve(solver.problem(H), W)
    for some in (1, 2):
        threads(some)
        parts = [solver.solve(solver.problem(H), W[rows]) for rows in Ranks(0, 2).bounds(130, UNIT)]
        assert same(whole, Solution.cat(parts)) == []


@pytest.mark.parametrize("columns", [200, 576, 1344])
def test_a_factor_has_the_same_bits_on_any_number_of_threads(columns, threads):
    _, H, _ = site(columns, 1)
    found = []
    for some in (1, 2):
        threads(some)
        found.append(factor(H, 0.01))
    assert torch.equal(found[0].N, found[1].N) and torch.equal(found[0].pivots, found[1].pivots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("few", [False, True])
def test_sums_made_in_parts_are_those_made_at_once(dtype, few, monkeypatch):
    """To the bit, also where a rank adds to what another one has begun."""
    if few:
        monkeypatch.setattr("optq.core.hessian.COPIED", 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 100, 600, generator=generator).to(dtype)
    y = (x + 0.01 * torch.randn(x.shape, generator=generator)).to(dtype)
    whole, parts, drift = Hessian(600), Hessian(600), torch.zeros(600, 600)
    for a, b in zip(x, y, strict=True):
        whole.add(a)
        add_drift(drift, a, b)
    runs = [Chunks(lambda own=own: own, torch.float32) for own in (x[:4], x[4:])]
    for first in parts.rows():
        for run in runs:
            run.add_to(parts.part(first), first)
        rows = slice(first, first + 256)
        total = torch.zeros_like(drift[rows])
        for a, b in zip(x, y, strict=True):
            add_drift(total, a, b, rows)
        assert torch.equal(total, drift[rows])
    parts.tokens = sum(run.tokens for run in runs)
    assert parts.tokens == whole.tokens
    assert torch.equal(parts.matrix(), whole.matrix())
