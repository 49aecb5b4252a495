"""The methods by the names that users give them: one row each."""

from __future__ import annotations

from typing import Any

from optq.core.gptq import GPTQ
from optq.core.magnitude import Magnitude, Wanda
from optq.core.obq import OBQ
from optq.core.obs import OBS
from optq.core.rtn import RTN
from optq.core.smoothquant import SmoothQuant
from optq.core.sparsegpt import SparseGPT

# Subclasses of Solver, each a dataclass with options of its own.
METHODS: dict[str, type[Any]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "obq": OBQ,
    "smoothquant": SmoothQuant,
}

# And those that remove weights, of Pruner.
PRUNERS: dict[str, type[Any]] = {
    "sparsegpt": SparseGPT,
    "obs": OBS,
    "wanda": Wanda,
    "magnitude": Magnitude,
}
