"""How much memory is free, and giving back what is not needed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

SHORT = 2**32  # bytes


def free(device: torch.device) -> int:
    """Bytes that a process may still take on ``device``; a limit set for it counts.

    Of a system that does not say, four GiB are assumed.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_available(), _group(), _limit()]
    return min((each for each in found if each is not None), default=2**32)


def trim() -> None:
    """Give freed memory back where it runs short: what a run keeps lies between what it let go.

    Elsewhere it is soon used again, and to get it anew costs a tenth of a run. Only glibc has such
    a call, and needs it: it returns none but the top of its heap by itself.
    """
    own = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if own is not None and free(torch.device("cpu")) < SHORT:
        own(0)


def _available() -> int | None:
    """What the system could give, caches dropped."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        return None


# Of control groups of version 2, and 1: where they are, their limit, what is used, and of that
# what files' pages take, which are dropped when others need the room.
GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
    "memory": (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache",
    ),
}


def _group() -> int | None:
    """What is left of the limit of a container, or of another control group."""
    limits = []
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, own = line.split(":", 2)
            if kind not in GROUPS:
                continue
            root, most, used, pages = GROUPS[kind]
            folder = Path(root + own)
            while folder.is_relative_to(root):
                if (folder / most).is_file() and (limit := (folder / most).read_text()) != "max\n":
                    stat = (folder / "memory.stat").read_text().split()
                    taken = int((folder / used).read_text()) - int(stat[stat.index(pages) + 1])
                    limits.append(int(limit) - taken)
                folder = folder.parent
    except (OSError, ValueError):
        return None
    return min(limits, default=None)


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
