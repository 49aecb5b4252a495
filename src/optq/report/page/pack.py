"""Many numbers in few bytes: columns as the page reads them back (``column`` of ``page.js``).

A record of 18,000 layers has to fit, with a library of charts, into 4 MB. So a column of few
different values is a list of these and one byte for each place; many numbers that are not whole
have two bytes each, on a scale of logarithms where none is below zero (to 0.1% over twelve
decades), else on a linear one.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np

FEW = 256  # different values, whose places fit into a byte
STEPS = 65535  # of two bytes
Number = float | int | None


def column(values: Sequence[Any]) -> dict[str, Any]:
    """``{"of", "at"}``, ``{"list"}``, ``{"low", "high", "log"}`` or ``{"low", "high", "linear"}``.

    The last two are for floats alone, None among them: the step 0 stands for it, and in a column
    on a scale of logarithms the step 1 for zero.
    """
    different = list(dict.fromkeys(values))
    if len(different) <= FEW:
        places = {value: place for place, value in enumerate(different)}
        at = np.array([places[value] for value in values], dtype=np.uint8)
        return {"of": [rounded(value) for value in different], "at": text(at)}
    if not any(isinstance(value, float) for value in different):
        return {"list": list(values)}
    numbers = np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    known = numbers[~np.isnan(numbers)]
    logarithmic = bool((known >= 0).all())
    if logarithmic:
        scale, first = np.where(numbers > 0, numbers, np.nan), 2
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.log(scale)
    else:
        scale, first = numbers, 1
    low, high = float(np.nanmin(scale)), float(np.nanmax(scale))
    span = (high - low) or 1.0
    steps = first + np.round((scale - low) / span * (STEPS - first))
    steps = np.where(numbers == 0, 1, steps) if logarithmic else steps
    at = np.where(np.isnan(numbers), 0, steps).astype("<u2")
    return {"low": low, "high": high, "log" if logarithmic else "linear": text(at)}


def rounded(value: Any, digits: int = 4) -> Any:
    """A number with so many significant digits; anything else as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def text(numbers: np.ndarray[Any, Any]) -> str:
    """Bytes as base64, little-endian."""
    return b64encode(numbers.tobytes()).decode("ascii")


def shares(counts: Sequence[int]) -> np.ndarray[Any, Any]:
    """Counts as two bytes each, of the largest: of the rarest codes too three digits are right."""
    most = max(counts, default=0) or 1
    return np.round(np.array(counts, dtype=np.float64) / most * STEPS).astype("<u2")


def levels(values: Sequence[float]) -> tuple[np.ndarray[Any, Any], float, float]:
    """Values as bytes on a scale of logarithms between two of them; the byte 0 stands for zero."""
    numbers = np.array(values, dtype=np.float64)
    there = numbers[numbers > 0]
    if not len(there):
        return np.zeros(len(numbers), dtype=np.uint8), 1.0, 1.0
    low, high = float(there.min()), float(there.max())
    span = math.log(high / low) or 1.0
    logs = np.log(np.where(numbers > 0, numbers, low) / low) / span
    steps = np.where(numbers > 0, 1 + np.round(logs * 254), 0)
    return steps.astype(np.uint8), low, high
