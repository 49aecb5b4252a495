"""torch's thread-local modes, put aside while a coroutine sleeps.

A forward that pauses inside ``with torch.autocast(..)`` would leave autocast on for the solver and
for every other coroutine, which share its thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_modes() -> Iterator[None]:
    """No autocast and no gradients inside; whatever was set before is back afterwards."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    autocast = {device: torch.is_autocast_enabled(device) for device in devices}
    dtypes = {device: torch.get_autocast_dtype(device) for device in devices}
    gradients = torch.is_grad_enabled()
    cache = torch.is_autocast_cache_enabled()
    for device in devices:
        torch.set_autocast_enabled(device, False)
    torch.set_grad_enabled(False)
    torch.clear_autocast_cache()  # it holds casts of weights that may change meanwhile
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for device in devices:
            torch.set_autocast_enabled(device, autocast[device])
            torch.set_autocast_dtype(device, dtypes[device])
        torch.set_autocast_cache_enabled(cache)
        torch.set_grad_enabled(gradients)
