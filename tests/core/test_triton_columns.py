"""The column loop as a Triton kernel: the results of the plain loop.

On a machine without a GPU it runs in Triton's interpreter, which is slow: sizes are small.
"""

from importlib.util import find_spec

import pytest
import torch
from core.problems import problem
from pretend import pretended

from optq.core import gpu, sweep
from optq.core.gptq import GPTQ
from optq.core.problem import Factor

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from optq.core import triton_columns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Options, columns, rows, the kind of the Hessian. Rows fill tiles of 32 and do not; columns fill
# blocks of 64 and do not.
CASES = [
    ({"wbits": 4}, 72, 40, "correlated"),
    ({"wbits": 3, "groupsize": 32, "blocksize": 128}, 64, 17, "correlated"),
    ({"wbits": 2, "groupsize": 16, "static_groups": True, "sym": False}, 64, 33, "correlated"),
    ({"wbits": 3, "groupsize": 16, "actorder": True, "sym": False}, 64, 20, "outlier inputs"),
    (
        {"wbits": 4, "groupsize": 16, "actorder": True, "static_groups": True, "sym": False},
        *(64, 20, "outlier inputs"),
    ),
    ({"wbits": 4, "groupsize": 24, "actorder": "group"}, 64, 32, "dead columns"),
    ({"wbits": 8, "groupsize": 12, "sym": False, "blocksize": 5}, 40, 20, "few tokens"),
    ({"wbits": 2, "sym": False}, 1, 1, "correlated"),
]


@pytest.fixture
def launches(monkeypatch):
    """Columns and weights of each launch."""
    found = []
    launch = triton_columns.column_loop

    def launched(columns, factors, *rest):
        found.append((columns.stop - columns.start, len(factors)))
        launch(columns, factors, *rest)

    monkeypatch.setattr(triton_columns, "column_loop", launched)
    return found


def choose(monkeypatch, kernel):
    monkeypatch.setattr(sweep, "_on_gpu", lambda W: kernel)
    monkeypatch.setattr(sweep, "serves", lambda W: False)


def solve(solver, problems):
    """Solutions of all problems in one sweep, where they can be."""
    tensors = [each.tensors(torch.float32) for each in problems]
    sites = [solver.problem(H.to(DEVICE)) for _, H in tensors]
    return solver.solve_together(sites, [W.to(DEVICE) for W, _ in tensors], [None] * len(sites))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_result_is_the_plain_loop_s(monkeypatch, launches, case):
    options, columns, rows, hessian = case
    problems = [problem(rows, columns, hessian, seed=seed) for seed in (5, 7)]
    solver = GPTQ.plain(**options)
    choose(monkeypatch, kernel=False)
    plain = solve(solver, problems)
    assert not launches
    choose(monkeypatch, kernel=True)
    found = solve(solver, problems)

    together = 1 if options.get("actorder") is True and options.get("static_groups") else 2
    assert {weights for _, weights in launches} == {together}
    assert sum(count for count, _ in launches) == 2 * columns / together
    most = min(options.get("blocksize", 64), options.get("groupsize", columns), 64)
    static = options.get("static_groups") or "groupsize" not in options
    assert max(count for count, _ in launches) <= (64 if static else most)
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours.codes == theirs.codes).double().mean() > 0.99
        assert abs(ours.error.sum() / theirs.error.sum() - 1) < 1e-4
        torch.testing.assert_close(ours.scales, theirs.scales)
        assert ours.fell_back.equal(theirs.fell_back)


def loop(W, N, squares, scale, zero, group, levels):
    """The column loop by its definition, float64: codes, errors, what adds to the residual."""
    W_hat, W, residual = W.clone(), W.clone(), torch.zeros(W.shape[1], dtype=W.dtype)
    codes = torch.zeros(W.shape, dtype=torch.uint8)
    for j in range(len(W)):
        s, z = scale[group[j]], zero[group[j]]
        code = (torch.round(W_hat[j] / s) + z).clamp(0, levels)
        q = (code - z) * s
        codes[j] = code.to(torch.uint8)
        residual += squares[j] * (W_hat[j] - q) ** 2
        W[j] -= q
        W_hat[j + 1 :] += N[j, j + 1 :, None] * W[j]
    return codes, W, residual


def test_one_launch_is_the_loop_by_its_definition():
    """Two weights of 21 rows; four groups that change from column to column; ties; both ends."""
    generator = torch.Generator().manual_seed(3)
    cols, rows, weights, levels = 20, 21, 2, 7
    W = torch.randint(-40, 40, (cols, weights * rows), generator=generator).double() / 8
    scale = torch.tensor([0.5, 1.0, -0.25, 2.0], dtype=torch.float64)[:, None].expand(4, 42)
    zero = torch.randint(0, 8, (4, 42), generator=generator).double()
    group = torch.randint(0, 4, (cols,), generator=generator, dtype=torch.int32)
    # Every sum is exact in float32: numerators are small, denominators powers of two.
    N = torch.randint(-2, 3, (weights, cols, cols), generator=generator).double() / 4
    N = N.triu(1) * (torch.rand(N.shape, generator=generator) < 0.3)
    N += torch.eye(cols) + 100 * torch.ones(cols, cols).tril(-1)  # below is nothing to read
    squares = 1 + torch.rand(weights, cols, generator=generator).double()

    one = torch.ones(cols, device=DEVICE)
    factors = [
        Factor(N[i].float().to(DEVICE), one, one, squares[i].float().to(DEVICE), 0.0, 0)
        for i in range(weights)
    ]
    single = [each.float().contiguous().to(DEVICE) for each in (W, W, scale, zero)]
    W_hat, left, *grids = single
    codes = torch.zeros(W.shape, dtype=torch.uint8, device=DEVICE)
    residual = torch.ones(42, device=DEVICE)
    triton_columns.column_loop(
        *(slice(0, cols), factors, group.to(DEVICE), levels),
        *(W_hat, left, codes, *grids, residual),
    )
    for index in range(weights):
        own = slice(index * rows, (index + 1) * rows)
        expected = loop(
            *(W[:, own], N[index], squares[index], scale[:, own], zero[:, own], group, levels)
        )
        assert codes[:, own].cpu().equal(expected[0])
        assert left[:, own].cpu().double().equal(expected[1])
        torch.testing.assert_close(residual[own].cpu().double() - 1, expected[2], rtol=1e-5, atol=0)
        assert {0, levels} <= set(expected[0].flatten().tolist())
    assert W_hat.cpu().double().equal(W)


def test_a_tensor_that_is_not_contiguous_is_refused():
    wide, one = torch.zeros(16, 8), torch.ones(16)
    tensors = [wide, wide, wide.to(torch.uint8), wide, wide, torch.zeros(8)]
    factors = [Factor(torch.eye(16), one, one, one, 0.0, 0)]
    for index in range(5):
        given = list(tensors)
        given[index] = torch.zeros(8, 16, dtype=given[index].dtype).T
        with pytest.raises(ValueError, match="contiguous"):
            triton_columns.column_loop(
                slice(0, 16), factors, torch.zeros(16, dtype=torch.int32), 15, *given
            )


# Where it is taken


def test_it_is_taken_for_float32_on_a_gpu(monkeypatch):
    with pretended() as device:
        single = torch.ones(1, device=device)
        assert not sweep._on_gpu(single)  # for Triton is told that torch has no CUDA
        monkeypatch.setattr(sweep, "triton_serves", lambda device: True)
        assert sweep._on_gpu(single) and not sweep._on_gpu(single.double())
        assert not sweep._on_gpu(torch.ones(1))


@pytest.mark.parametrize(
    ("changed", "serves"),
    [
        ({}, True),
        ({"find_spec": lambda name: None}, False),
        ({"OLDEST": (99, 0)}, False),
        ({"torch.version.cuda": None}, False),  # AMD's, and no GPU at all
        ({"torch.cuda.get_device_capability": lambda device: (7, 5)}, False),
        ({"which": lambda name: None}, False),
        ({"which": lambda name: "/usr/bin/clang" if name == "clang" else None}, True),
        ({"sysconfig.get_path": lambda name, scheme: "/nowhere"}, False),
    ],
    ids=["here", "no Triton", "older", "no CUDA", "old GPU", "no compiler", "clang", "no headers"],
)
def test_triton_serves_where_it_is_and_can_build(monkeypatch, tmp_path, changed, serves):
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    given = {
        "torch.version.cuda": "12.8",
        "torch.cuda.get_device_capability": lambda device: (8, 0),
        "which": lambda name: "/usr/bin/gcc" if name == "gcc" else None,
        "sysconfig.get_path": lambda name, scheme: str(tmp_path),
    }
    for name, value in (given | changed).items():
        monkeypatch.setattr(f"optq.core.gpu.{name}", value)
    assert gpu.triton_serves(torch.device("cuda:0")) == serves


def test_elsewhere_the_interpreter_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(gpu, "which", lambda name: None)
    assert gpu.triton_serves(torch.device("cpu"))
