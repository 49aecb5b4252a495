"""How much memory is free, and giving back what is not needed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch


def free(device: torch.device) -> int:
    """Bytes that a process may still take on ``device``; a limit set for it counts.

    Of a system that does not say, four GiB are assumed.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_available(), _group(), _limit()]
    return min((each for each in found if each is not None), default=2**32)


def trim() -> None:
    """Give freed memory back: what a run keeps lies between what it has let go.

    Only glibc has such a call, and needs it: it returns none but the top of its heap by itself.
    """
    own = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if own is not None:
        own(0)


def _available() -> int | None:
    """What the system could give, caches dropped."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        return None


def _group() -> int | None:
    """What is left of the limit of a container, or of another control group."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        folder = Path(f"/sys/fs/cgroup{own}")
        limits = []
        while folder.is_relative_to("/sys/fs/cgroup"):
            if (folder / "memory.max").is_file():
                most = (folder / "memory.max").read_text().strip()
                used = int((folder / "memory.current").read_text())
                cached = (folder / "memory.stat").read_text().split()
                used -= int(cached[cached.index("file") + 1])
                limits += [int(most) - used] if most != "max" else []
            folder = folder.parent
        return min(limits, default=None)
    except (OSError, ValueError):
        return None


def _limit() -> int | None:
    """What is left of ``ulimit -d``."""
    if sys.platform != "linux":
        return None
    import resource

    most = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if most == resource.RLIM_INFINITY:
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return most - next(int(line.split()[1]) * 1024 for line in lines if "VmData" in line)
