"""OPTQ: quantize the weights of language models with GPTQ.

Names are loaded when they are first used, so that importing the package does nothing else.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_HOME = {
    "GPTQ": "optq.core.gptq",
    "Magnitude": "optq.core.magnitude",
    "OBQ": "optq.core.obq",
    "OBS": "optq.core.obs",
    "QEP": "optq.core.qep",
    "RTN": "optq.core.rtn",
    "SparseGPT": "optq.core.sparsegpt",
    "Wanda": "optq.core.magnitude",
    "Mixed": "optq.budget",
    "ModelConfig": "optq.config",
    "Runner": "optq.runner",
    "SmoothQuant": "optq.core.smoothquant",
    "Tune": "optq.tune",
    "load": "optq.config",
    "OptqError": "optq.errors",
}
__all__ = [
    "GPTQ",
    "OBQ",
    "OBS",
    "QEP",
    "RTN",
    "Magnitude",
    "Mixed",
    "ModelConfig",
    "OptqError",
    "Runner",
    "SmoothQuant",
    "SparseGPT",
    "Tune",
    "Wanda",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'optq' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
