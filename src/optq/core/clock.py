"""Seconds spent on a device."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def elapsed(start: float, on: Tensor) -> float:
    """Seconds since ``start`` (``time.perf_counter()``), with all work on ``on``'s device done."""
    if on.device.type == "cuda":
        torch.cuda.synchronize(on.device)
    return time.perf_counter() - start
