"""How exactly torch multiplies: set here, and put back, for everything in core.

What a caller has set for his own model (TF32, bfloat16) must not reach a solver: an error that is
computed in ten bits of mantissa cannot be promised to be below another one. The settings are the
process', so one thread at a time may change them: another one waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor

_ONE_THREAD = RLock()
BACKENDS = ("cuda", "mkldnn")  # whose float32 products can be made of less


@contextmanager
def exact_products(units: str = "ieee") -> Iterator[None]:
    """float32 products in full; as a decorator, of a whole function.

    ``units="bf16"``: on a CPU they may run on bfloat16 units.
    """
    with _ONE_THREAD:
        before = _get()
        _set("ieee", units)
        try:
            yield
        finally:
            _set(*before)


def quick_dtype(like: Tensor) -> torch.dtype:
    """The dtype for products that need not be exact: bfloat16, where float32 is slower."""
    quick = like.dtype == torch.float32 and fast_bfloat16(like.device)
    return torch.bfloat16 if quick else like.dtype


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a bfloat16 product is faster than a float32 one: not where it is emulated."""
    if device.type == "cuda":
        return True
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and bool(native())


def _get() -> tuple[Any, ...]:
    """What :func:`_set` restores. A setting that is its parent's is left to follow its parent."""
    if not hasattr(torch.backends, "fp32_precision"):  # torch before 2.9 has one for all
        return (torch.get_float32_matmul_precision(),)
    found = []
    for name in BACKENDS:
        backend = getattr(torch.backends, name)
        parents = getattr(backend, "fp32_precision", None), torch.backends.fp32_precision
        own = backend.matmul.fp32_precision
        found.append("none" if own in parents else own)
    return tuple(found)


def _set(*precisions: str) -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        (*_, last) = precisions
        torch.set_float32_matmul_precision({"ieee": "highest", "bf16": "medium"}.get(last, last))
        return
    for name, precision in zip(BACKENDS, precisions, strict=True):
        getattr(torch.backends, name).matmul.fp32_precision = precision
