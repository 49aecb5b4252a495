"""Ranges of columns cut into parts, for products that would do twice the work as one."""

from __future__ import annotations

from collections.abc import Iterator

TILE = 256  # columns at least: narrower products are slow


def tiles(columns: int) -> Iterator[slice]:
    """Eighths of a symmetric or triangular matrix: with one product each, a sixteenth is wasted."""
    width = max(TILE, columns // 8)
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def middle(start: int, stop: int, unit: int) -> int:
    """Where to halve a range, on a multiple of ``unit`` from its start."""
    return start + unit * max(1, (stop - start) // unit // 2)
