"""What the inverse costs: ``python bench/inverse.py``.

The sweep needs one triangular matrix. The paper gets it as ``cholesky(H^-1, upper)``: a Cholesky
factor, the inverse from it, and a Cholesky factor of that. Here it is one upper Cholesky factor,
``H = U U^T`` (``optq.core.problem.factor``). Both in float32, in turn, on one thread, for Hessians
of 2 n random tokens with strong common directions, damped by 1%. LAPACK's plain Cholesky stands
beside them; and how far each one's ratios ``N[i, j]`` are from float64's, relative to their norm.
Appends one record to bench/results/inverse.jsonl.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import append, machine
from torch import Tensor

from optq.core.problem import factor

RESULTS = Path(__file__).parent / "results" / "inverse.jsonl"


def hessian(n: int) -> Tensor:
    """Float64, of inputs with sixteen strong directions; damping included."""
    x = torch.randn(2 * n, n) + 3 * torch.randn(2 * n, 16) @ torch.randn(16, n)
    x = x.double()
    H = x.T @ x / len(x)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return H


def paper(H: Tensor) -> Tensor:
    """``R`` with ``H^-1 = R^T R``."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def ratios_of(R: Tensor) -> Tensor:
    """The paper's ``R[i, j] / R[i, i]``, by which errors of ``w_i`` spread over ``w_j``."""
    return R / R.diagonal()[:, None]


def ratios_from(N: Tensor) -> Tensor:
    """The same from ours: ``R = U^-1``, so they are those of ``N^-1``."""
    one = torch.eye(len(N), dtype=N.dtype)
    return torch.linalg.solve_triangular(N, one, upper=True, unitriangular=True)


def clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024,2048,4096")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record: dict[str, Any] = {"bench": "inverse", **machine(), "threads": arguments.threads}
    record["rows"] = []
    for n in map(int, arguments.sizes.split(",")):
        exact = hessian(n)
        H = exact.float()
        ways = {
            "paper": lambda H=H: paper(H),
            "ours": lambda H=H: factor(H, 0.0),
            "lapack": lambda H=H: torch.linalg.cholesky(H),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(arguments.runs + 1):
            for name, way in ways.items():
                took = clock(way)
                if run:
                    times[name].append(took)
        median = {name: round(statistics.median(each), 5) for name, each in times.items()}
        row: dict[str, Any] = {"n": n, "seconds": median}
        row["ratio"] = round(median["paper"] / median["ours"], 2)
        truth = ratios_of(paper(exact))
        found = {"paper": ratios_of(paper(H)), "ours": ratios_from(factor(H, 0.0).N)}
        off = {
            name: ((x.double() - truth).norm() / truth.norm()).item() for name, x in found.items()
        }
        row["off"] = {name: float(f"{value:.3g}") for name, value in off.items()}
        record["rows"].append(row)
        print(row, flush=True)
    append(RESULTS, record)


if __name__ == "__main__":
    main()
