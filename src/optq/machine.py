"""The machine that a run is on: how fast it multiplies, and what the process holds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from optq.core.clock import elapsed
from optq.core.precision import exact_products, quick_dtype


@dataclass(frozen=True)
class Speed:
    """Multiply-adds a second, in float32 and in what products may be made of, and bytes passed."""

    exact: float
    quick: float
    bytes: float


@exact_products()
def speed_of(device: torch.device) -> Speed:
    """Measured here, in a quarter of a second on a CPU."""

    def rate(amount: float, act: Callable[[], object]) -> float:
        act()
        best, until = 0.0, time.perf_counter() + 0.06
        while time.perf_counter() < until:
            start = time.perf_counter()
            last = act()
            assert isinstance(last, torch.Tensor)
            best = max(best, amount / elapsed(start, last))
        return best

    one = torch.randn(768, 768, device=device)
    few = one.to(quick_dtype(one))
    long = torch.randn(2**22, device=device)
    return Speed(
        rate(768**3, lambda: one @ one),
        rate(768**3, lambda: few @ few),
        rate(4 * len(long), lambda: long.mul_(1.0)),
    )


def resident() -> int:
    """Bytes that this process has in memory: the libraries, as long as nothing is loaded."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
