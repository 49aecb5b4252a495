"""The methods by the names that users give them: one row each."""

from __future__ import annotations

from typing import Any

from optq.core.gptq import GPTQ
from optq.core.obq import OBQ
from optq.core.rtn import RTN
from optq.core.smoothquant import SmoothQuant

# Subclasses of Solver, each a dataclass with options of its own.
METHODS: dict[str, type[Any]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "obq": OBQ,
    "smoothquant": SmoothQuant,
}
