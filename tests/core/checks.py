"""What every solver promises about what it returns, checked in float64."""

import numpy as np
import oracles
import torch

from optq.core.grid import IntegerGrid, Storage
from optq.core.problem import Problem

EXACT = Storage(scale_dtypes=())
STORAGES = (
    Storage(),
    Storage(min_zero=1),
    Storage((torch.float16, torch.bfloat16)),
)


def solved(solver, W, H, storage=Storage(), aim=None):
    """The solution, which knows the problem that it solves."""
    problem = solver.problem(H)
    solution = solver.solve(problem, W, aim, storage)
    object.__setattr__(solution, "problem", problem)
    return solution


def array(tensor):
    return tensor.double().numpy()


def rounding_bound(W, Q, H, d, dtype):
    """``[rows]``: how far rounding in ``dtype`` can move an error that is computed through a
    factor of ``H + d I``: the unit roundoff, times the terms that are summed."""
    eps, cols = torch.finfo(dtype).eps, W.shape[1]
    trace = np.trace(H) + d * cols
    miss, size = np.linalg.norm(W - Q, axis=1), np.linalg.norm(W, axis=1)
    return trace * (8 * cols * eps * miss * (miss + size) + (cols * eps * size) ** 2)


def check_solution(solution, p, options, storage, dtype):
    """Codes in range, grids that a file can keep, errors that are true, none above rounding's."""
    rows, cols = p.W.shape
    bits, size = options["wbits"], options["groupsize"]
    size = cols if size == -1 else min(size, cols)
    groups = -(-cols // size)

    assert solution.codes.shape == (rows, cols) and solution.codes.dtype == torch.uint8
    assert int(solution.codes.max()) < 2**bits
    assert solution.scales.shape == solution.zeros.shape == (rows, groups)
    assert int(solution.zeros.min()) >= storage.min_zero and int(solution.zeros.max()) < 2**bits
    if options["sym"]:
        assert (solution.zeros == 2 ** (bits - 1)).all()
    assert torch.isfinite(solution.scales).all() and (solution.scales != 0).all()
    if not (options["sym"] and options["mse"]):  # whose range search may mirror a grid
        assert (solution.scales > 0).all()
    for storage_dtype in storage.scale_dtypes:
        stored = solution.scales.to(storage_dtype)
        assert torch.equal(stored.to(solution.scales.dtype), solution.scales)

    assert solution.g_idx.shape == (cols,) and solution.g_idx.dtype == torch.int32
    counts = np.bincount(solution.g_idx.numpy(), minlength=groups)
    assert counts.tolist() == [min(size, cols - g * size) for g in range(groups)]

    g_idx = solution.g_idx.numpy()
    codes, zeros = solution.codes.numpy().astype(int), solution.zeros.numpy().astype(int)
    Q = oracles.dequantize(codes, array(solution.scales), zeros, g_idx)
    np.testing.assert_allclose(array(solution.weight), Q, rtol=2 * torch.finfo(dtype).eps)

    dead = np.diag(p.H) == 0
    assert (solution.problem.dead.numpy() == dead).all()
    # Without evidence a weight is the nearest value of its grid.
    for n, k in np.argwhere(dead[None, :] & np.ones_like(codes, dtype=bool)):
        scale, zero = array(solution.scales)[n, g_idx[k]], zeros[n, g_idx[k]]
        values = scale * (np.arange(2**bits) - zero)
        least = np.abs(p.W[n, k] - values).min()
        slack = 8 * torch.finfo(dtype).eps * max(abs(p.W[n, k]), abs(scale))
        assert abs(p.W[n, k] - Q[n, k]) <= least + slack

    W, damp = p.W, solution.problem.damp
    error = oracles.row_errors(W, Q, p.H)
    bound = rounding_bound(W, Q, p.H, damp, dtype)
    assert (np.abs(array(solution.error) - error) <= bound).all()

    R = rounded_weight(W, p.H, g_idx, options, storage, dtype)
    rounded = oracles.row_errors(W, R, p.H)
    bound += rounding_bound(W, R, p.H, damp, dtype)
    assert (error <= rounded + bound).all()
    if dtype == torch.float64:
        assert (np.abs(array(solution.rtn_error) - rounded) <= bound).all()


def rounded_weight(W, H, g_idx, options, storage, dtype):
    """Round-to-nearest on the groups that the solution has, group by group.

    Grids are the implementation's, whose fits have tests of their own, and the division is done
    in ``dtype``: in another one a scale or a weight half way between two values, as the largest
    of a symmetric group is, goes the other way.
    """
    grid = IntegerGrid(options["wbits"], sym=options["sym"], mse=options["mse"])
    R, weighs = np.empty(W.shape), Problem(torch.tensor(H, dtype=dtype)).importance
    for g in range(max(g_idx) + 1):
        group = torch.tensor(W[:, g_idx == g], dtype=dtype)
        importance = weighs[torch.tensor(g_idx == g)]
        scale, zero = (part[:, None] for part in grid.fit(group.T, storage, importance))
        steps = torch.clamp(torch.round(group / scale), -zero, 2 ** options["wbits"] - 1 - zero)
        R[:, g_idx == g] = array(steps) * array(scale)
    return R


def same_codes(solution, codes, scales, sure, W):
    """Codes equal, in the rows where it is sure which of two sets of codes is the better one.

    Groups whose scale is rounding noise beside the row's weights (an exact zero in one order of
    summation is 1e-17 in another) decode to noise in either.
    """
    ours = solution.codes.numpy().astype(int)
    g_idx = solution.g_idx.numpy()
    largest = np.abs(W).max(1)
    noise = np.abs(scales[:, g_idx]) < 1e-9 * largest[:, None]
    different = (ours != codes) & ~noise & sure[:, None]
    assert not different.any(), (
        f"{different.sum()} codes differ, first at {np.argwhere(different)[0]}"
    )
