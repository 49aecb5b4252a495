"""The CPU's kernels against PyTorch's bfloat16 linear: ``python bench/kernels.py``.

For each shape, bits and number of activation rows the two products take turns, so that what else
the machine does meets both alike; a time is the median of its runs. Several copies of each weight
take turns as well: a model's next layer is not in the cache, and neither is the next copy.
Checked first: the product is right to the kernel's stated error.

Prints one table and appends one record to bench/results/kernels.jsonl.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from machine import append, machine
from torch.nn.functional import linear

from optq.core.weight import QuantizedWeight, group_index
from optq.kernels.table import pick

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
SHAPES = ((4096, 4096), (11008, 4096))  # rows, columns
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512)
CACHE = 2**28  # bytes of weights in turn: more than any cache holds


def random_weight(rows: int, cols: int, wbits: int, groupsize: int) -> QuantizedWeight:
    width = cols if groupsize == -1 else groupsize
    codes = torch.randint(2**wbits, (cols, rows), dtype=torch.uint8).T
    scales = (0.5 + torch.rand(rows, cols // width)).bfloat16().float() / 128
    zeros = torch.full_like(scales, 2 ** (wbits - 1), dtype=torch.uint8)
    return QuantizedWeight(wbits, codes, scales, zeros, group_index(cols, width, codes.device))


def paired(ours: Callable[[], object], theirs: Callable[[], object], seconds: float):
    """Median times of two functions that take turns for about so many seconds."""
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 5:
        for function, kept in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return tuple(map(statistics.median, times))


def measure(rows: int, cols: int, wbits: int, groupsize: int, batches, seconds: float):
    weight = random_weight(rows, cols, wbits, groupsize)
    kernel = pick(weight, torch.bfloat16)
    dense = weight.weight.to(torch.bfloat16).contiguous()  # as nn.Linear has it
    copies = max(2, CACHE // dense.nbytes)
    denses = cycle([dense.clone() for _ in range(copies)])
    products = cycle([kernel.build(weight, torch.bfloat16) for _ in range(4 * copies)])
    found = []
    for batch in batches:
        x = torch.randn(batch, cols, dtype=torch.bfloat16)
        exact = x.double() @ dense.double().T
        error = (next(products)(x).double() - exact).norm() / exact.norm()
        if not error < kernel.error[torch.bfloat16]:
            raise SystemExit(f"{kernel.name} is wrong: relative error {error:.2g}")
        ours, theirs = paired(
            lambda x=x: next(products)(x), lambda x=x: linear(x, next(denses)), seconds
        )
        found.append(
            {
                "rows": rows,
                "cols": cols,
                "wbits": wbits,
                "groupsize": groupsize,
                "kernel": kernel.name,
                "batch": batch,
                "ms": round(ours * 1e3, 4),
                "bfloat16_ms": round(theirs * 1e3, 4),
                "ratio": round(theirs / ours, 2),
                "error": float(f"{error:.2g}"),
            }
        )
        print(
            "{rows:6} x {cols} {wbits} bits g{groupsize:<4} {kernel:9} batch {batch:4} "
            "{ms:8.3f} ms  bfloat16 {bfloat16_ms:8.3f} ms  {ratio:5.2f}x".format(**found[-1]),
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each pair")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    record = {"bench": "kernels", **machine(), "results": []}
    for rows, cols in SHAPES:
        for wbits, groupsize in ((4, 128), (4, -1), (3, 128), (8, 128), (8, -1)):
            batches = arguments.batches if (wbits, groupsize) == (4, 128) else (1, 8)
            with torch.no_grad():
                record["results"] += measure(
                    rows, cols, wbits, groupsize, batches, arguments.seconds
                )
    append(RESULTS, record)


if __name__ == "__main__":
    main()
