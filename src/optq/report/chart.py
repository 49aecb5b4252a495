"""A bar chart of a comparison as SVG: how far perplexity rises, method by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from optq.errors import OutputError, SettingError

BAR, GAP, LABEL, LENGTH, NUMBER = 18, 6, 170, 360, 200  # pixels
COLORS = {
    "rtn": "#c0392b",
    "plain": "#7f8c8d",
    "no-qep": "#2471a3",
    "gptq": "#16a085",
    "best": "#1d8348",
    "budget": "#7d3c98",
}


def check(path: Path) -> None:
    """Refuse, before any work, a chart that could not be written."""
    if path.suffix.lower() != ".svg":
        raise SettingError(f"the chart {path} is not an .svg", "name it so: charts are SVG")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}", "make it, or name another one")


def write(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write :func:`bars` to ``path``."""
    try:
        path.write_text(bars(title, rows), encoding="utf-8")
    except OSError as error:
        raise OutputError.of(path, error, "--chart") from error


def bars(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One panel for each width and group size, each on the scale of its own largest rise.

    ``rows`` as :class:`optq.compare.Row` holds them; the first is the full-precision model.
    """
    panels: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows[1:]:
        panels.setdefault((row["wbits"], row["groupsize"]), []).append(row)
    heading, y = f"{title}: rise over full precision ({rows[0]['perplexity']:.2f})", 24
    parts = [_text(0, y, heading, weight="bold")]
    for (wbits, groupsize), members in panels.items():
        y += 30
        groups = "one scale to a row" if groupsize == -1 else f"groups of {groupsize}"
        parts.append(_text(0, y, f"{wbits} bits, {groups}", weight="bold"))
        most = max([1e-9, *(row["rise"] for row in members)])
        for row in members:
            y += BAR + GAP
            length = max(row["rise"], 0) / most * LENGTH
            color = COLORS.get(row["method"], "#555")
            parts.append(_text(LABEL - 8, y, row["method"], anchor="end"))
            parts.append(
                f'<rect x="{LABEL}" y="{y - BAR + 5}" width="{length:.1f}" height="{BAR}"'
                f' fill="{color}"/>'
            )
            number = f"{row['rise']:+.3f} ({row['bits_per_weight']:.2f} bits a weight)"
            parts.append(_text(LABEL + length + 6, y, number))
    width, height = LABEL + LENGTH + NUMBER, y + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )
