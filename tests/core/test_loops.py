"""The compiled loops give what torch's operations give, on any number of threads."""

import os
import subprocess
import sys

import pytest
import torch

from optq.core import compiled
from optq.core.gptq import GPTQ
from optq.core.grid import IntegerGrid, Storage

COLUMNS, ROWS = 192, 520  # rows: more than one thread does, and part of a tile


def problem(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = torch.randn(800, COLUMNS, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    weight[:, 5] *= 8  # a tail
    weight[3] = 0
    return (inputs.T @ inputs / 800).to(dtype), weight.to(dtype)


def solve(quantizer, H, *weights, storage=Storage()):
    problems = [quantizer.problem(H) for _ in weights]
    return quantizer.solve_together(problems, weights, [None] * len(weights), storage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("quantizer", "storage"),
    [
        (GPTQ(4, 64), Storage()),
        (GPTQ(3, 48, sym=False), Storage(min_zero=1)),
        (GPTQ(2, 32, sym=False), Storage()),
        (GPTQ(8, -1), Storage()),
        (GPTQ(3, 128, actorder=True), Storage()),
        (GPTQ(4, 64, actorder=True, static_groups=True), Storage(())),
        (GPTQ.plain(4, 64), Storage()),
    ],
)
def test_as_torch_s_operations(quantizer, storage, dtype, monkeypatch):
    H, weight = problem(dtype)
    assert compiled.serves(weight)
    made = solve(quantizer, H, weight, storage=storage)[0]
    monkeypatch.setattr(compiled, "loops", lambda: None)
    assert not compiled.serves(weight)
    plain = solve(quantizer, H, weight, storage=storage)[0]
    assert (made.codes == plain.codes).float().mean() > 0.995
    torch.testing.assert_close(made.error.sum(), plain.error.sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(made.rtn_error.sum(), plain.rtn_error.sum(), rtol=1e-4, atol=0)


def test_weights_side_by_side_as_each_alone():
    H, weight = problem()
    other = weight.flip(0).contiguous()
    both = solve(GPTQ(4, 64), H, weight, other)
    for made, alone in zip(both, (weight, other), strict=True):
        assert torch.equal(made.codes, solve(GPTQ(4, 64), H, alone)[0].codes)


def test_any_number_of_threads_gives_the_same_bits():
    H, weight = problem()
    made, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(solve(GPTQ(3, 64), H, weight)[0])
    torch.set_num_threads(before)
    for other in made[1:]:
        assert torch.equal(made[0].codes, other.codes)
        assert torch.equal(made[0].scales, other.scales)


def test_no_rows():
    """What a rank may have of a small weight."""
    H, _ = problem()
    assert solve(GPTQ.plain(4, 64), H, torch.empty(0, COLUMNS))[0].codes.shape == (0, COLUMNS)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_the_search_loses_nothing(sym, near, monkeypatch):
    """Measured by what it is for: the weighted squares of what rounding misses."""
    _, weight = problem()
    group, importance = weight.T[:64].contiguous(), torch.rand(64, 1) ** 4
    grid = IntegerGrid(4, 64, sym, True)
    start = grid.fit(group, Storage()) if near else None

    def loss():
        _, values = grid.nearest(group, *grid.fit(group, Storage(), importance, start))
        return (importance * (group - values).square()).sum(0)

    found = loss()
    monkeypatch.setattr(compiled, "loops", lambda: None)
    plain = loss()
    torch.testing.assert_close(found.sum(), plain.sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("wbits", [3, 4])
def test_the_search_from_a_grid_that_reaches_too_little(wbits, monkeypatch):
    """A start whose lower end moves past 0: the grid that is tried is the one that is returned."""
    generator = torch.Generator().manual_seed(0)
    group, importance = torch.rand(48, 300, generator=generator), torch.ones(48, 1)
    group[7], importance[7] = -3 * torch.rand(300, generator=generator), 1e-6  # of no account
    grid = IntegerGrid(wbits, 48, False, True)
    near = 0.2 * torch.rand(300, generator=generator), torch.arange(300.0) % 3
    found = grid.fit(group, Storage(), importance, near)
    monkeypatch.setattr(compiled, "loops", lambda: None)
    for made, plain in zip(found, grid.fit(group, Storage(), importance, near), strict=True):
        assert torch.equal(made, plain)


def test_without_numba_torch_does_it():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from optq import GPTQ; from optq.core import compiled\n"
        "assert compiled.loops() is None\n"
        "made = GPTQ(4, 32).solve(GPTQ(4, 32).problem(torch.eye(64)), torch.randn(8, 64))\n"
        "print(made.error.sum().item() <= made.rtn_error.sum().item())"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "True"


def test_without_a_folder_to_keep_them_in_loops_are_compiled_anew(monkeypatch):
    kept = []

    def njit(cache=False, **options):
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr("numba.njit", njit)
    assert compiled.compiling(len) is len
    assert kept == [True, False]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("shape", [(130, 67), (1, 5), (64, 1), (0, 3)])
def test_transposed(shape, dtype, monkeypatch):
    wide = (100 * torch.randn(shape[0], 2 * shape[1])).abs().to(dtype)
    for matrix in (wide[:, : shape[1]], wide[:, ::2], wide.T[: shape[1]].T):
        made = compiled.transposed(matrix)
        assert torch.equal(made, matrix.T) and made.is_contiguous()
        made.zero_()
        assert shape[0] == 0 or matrix.any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_gives_the_same_bits():
    """OpenMP's threads are its parent's, and would end it."""
    code = (
        "import os, torch; from optq import GPTQ\n"
        "torch.set_num_threads(2)\n"
        "torch.manual_seed(0); H, W = torch.eye(64) + 0.1, torch.randn(200, 64)\n"
        "def solve(): return GPTQ(4, 32).solve(GPTQ(4, 32).problem(H), W).codes\n"
        "made, child = solve(), os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(not torch.equal(solve(), made))\n"
        "print(os.waitpid(child, 0)[1])"
    )
    run = [sys.executable, "-c", code]
    made = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300)
    assert made.stdout.strip() == "0"
