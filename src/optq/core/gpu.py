"""Whether kernels written in Triton run here."""

from __future__ import annotations

import os
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch

OLDEST = (3, 6)  # the oldest Triton that was tried
CAPABILITY = (8, 0)  # of an NVIDIA GPU: the oldest that Triton supports, with bfloat16 in hardware


def triton_serves(device: torch.device) -> bool:
    """Whether kernels run on ``device``: compiled on a GPU, elsewhere in Triton's interpreter."""
    if find_spec("triton") is None:
        return False
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return False
    if device.type != "cuda":
        return True
    if torch.version.cuda is None:  # AMD's GPUs say "cuda" too
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY and _builds()


def _builds() -> bool:
    """Whether there is what Triton builds a kernel's launcher with: a C compiler, and headers."""
    compiler = os.environ.get("CC") or which("gcc") or which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton
    return bool(compiler) and Path(sysconfig.get_path("include", scheme), "Python.h").exists()
