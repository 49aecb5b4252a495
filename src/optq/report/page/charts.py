"""The charts: made with Altair, compiled from Vega-Lite to Vega here, which takes a browser longer,
and drawn by ``page.js``, which fills in data by name. Colors of text, lines and marks are variables
of ``page.css``, and so follow light and dark.

Scales that carry numbers are viridis, and blue-orange where there is a middle: both read without
color vision. Series are told apart by Okabe and Ito's colors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import altair as alt


def ours(name: str) -> str:
    """A color that ``page.css`` gives, in light and in dark."""
    return f"var(--{name})"


PERCENT = ".3p"  # three significant digits
WHOLE = "floor(datum.value) == datum.value ? format(datum.value, 'd') : ''"  # no half block
SERIES = tuple(ours(f"series-{index}") for index in range(7))
TEXT = {
    **{"labelColor": ours("ink"), "titleColor": ours("muted"), "titleFontWeight": 500},
    **{"labelFontSize": 12, "titleFontSize": 12},
}
LINES = {"gridColor": ours("line"), "domainColor": ours("line"), "tickColor": ours("line")}
CONFIG = {
    "background": None,
    "font": "system-ui, 'Segoe UI', Roboto, sans-serif",
    "view": {"stroke": None},
    "axis": TEXT | LINES,
    "legend": TEXT,
    "autosize": {"type": "fit-x", "contains": "padding"},
}
WIDE = 30  # a range of values, high over low, that asks for a scale of logarithms


def heat(
    title: str,
    field: str,
    values: Sequence[float],
    blocks: Sequence[str],
    kinds: Sequence[str],
    form: str,
    over: str,
    middle: float | None = None,
) -> dict[str, Any]:
    """Blocks down, kinds of layers across; ``over``: the baseline that errors stand beside;
    ``middle``: the value where neither side is better.
    """
    several = "datum.layers > 1 ? datum.name + ', worst of ' + datum.layers : datum.name"
    scale = _scale(values, middle)
    color = alt.Color(f"{field}:Q", scale=scale, title=title, legend=_legend(form, scale))
    base = alt.Chart(alt.NamedData("cells")).transform_calculate(label=several)
    step = 22 if len(blocks) <= 12 else 15 if len(blocks) <= 36 else 11
    x = alt.X("kind_label:N", scale=alt.Scale(domain=list(kinds)), title=None).axis(
        labelAngle=-35, labelLimit=140, orient="top", labelAlign="left", labelPadding=4
    )
    y = alt.Y("block_label:N", scale=alt.Scale(domain=list(blocks)), title="block").axis(
        labelOverlap=True, titleAngle=-90
    )
    tooltip = [
        alt.Tooltip("label:N", title="layer"),
        alt.Tooltip("error:Q", title="relative error", format=PERCENT),
        alt.Tooltip("mean:Q", title="mean of all", format=PERCENT),
        alt.Tooltip("left:Q", title=f"of {over}'s error", format=PERCENT),
        alt.Tooltip("bits:N", title="bits"),
    ]
    if field not in ("error", "left", "bits"):
        tooltip.append(alt.Tooltip(f"{field}:Q", title=title, format=form))
    rects = base.mark_rect(cursor="pointer", stroke=ours("page"), strokeWidth=1).encode(
        x=x, y=y, color=color, tooltip=tooltip
    )
    ring = (
        alt.Chart(alt.NamedData("chosen"))
        .mark_rect(fill=None, stroke=ours("ring"), strokeWidth=3)
        .encode(x=x, y=y)
    )
    return _spec(alt.layer(rects, ring).properties(width="container", height=alt.Step(step)))


def experts(values: Sequence[float], kinds: Sequence[str], over: str) -> dict[str, Any]:
    """Those of one block: their numbers across, their projections down."""
    x = alt.X("expert:O", title="expert").axis(labelOverlap=True, labelAngle=0)
    y = alt.Y("kind_label:N", scale=alt.Scale(domain=list(kinds)), title=None).axis(labelLimit=140)
    scale = _scale(values)
    color = alt.Color(
        "error:Q", scale=scale, title="relative error", legend=_legend(PERCENT, scale)
    )
    tooltip = [
        alt.Tooltip("name:N", title="layer"),
        alt.Tooltip("error:Q", title="relative error", format=PERCENT),
        alt.Tooltip("left:Q", title=f"of {over}'s error", format=PERCENT),
        alt.Tooltip("tokens:Q", title="tokens seen", format=",.4~r"),
        alt.Tooltip("borrowed:Q", title="borrowed", format=",.4~r"),
    ]
    rects = (
        alt.Chart(alt.NamedData("cells"))
        .mark_rect(cursor="pointer")
        .encode(x=x, y=y, color=color, tooltip=tooltip)
    )
    ring = (
        alt.Chart(alt.NamedData("chosen"))
        .mark_rect(fill=None, stroke=ours("ring"), strokeWidth=2)
        .encode(x=x, y=y)
    )
    return _spec(alt.layer(rects, ring).properties(width="container", height=alt.Step(26)))


def gain(kinds: Sequence[str], over: str) -> dict[str, Any]:
    """What is left of the baseline's error: a tick for each block, by kinds of layers."""
    x = alt.X("left:Q", title=f"of {over}'s error", scale=alt.Scale(zero=True)).axis(
        format="~p", tickCount=5
    )
    y = alt.Y("kind_label:N", scale=alt.Scale(domain=list(kinds)), title=None).axis(labelLimit=140)
    base = alt.Chart(alt.NamedData("cells"))
    ticks = base.mark_tick(thickness=2, size=16, opacity=0.65, color=SERIES[0]).encode(
        x=x,
        y=y,
        tooltip=[
            alt.Tooltip("name:N", title="layer"),
            alt.Tooltip("left:Q", title=f"of {over}'s error", format=PERCENT),
        ],
    )
    middle = base.mark_point(filled=True, size=60, color=SERIES[5], opacity=1).encode(
        x="median(left):Q",
        y=y,
        tooltip=[alt.Tooltip("median(left):Q", title="median over blocks", format=PERCENT)],
    )
    return _spec(alt.layer(ticks, middle).properties(width="container", height=alt.Step(24)))


def depth(names: Sequence[str], drawn: Set[str]) -> dict[str, Any]:
    """How far hidden states are from full precision's behind each block.

    ``drawn``: those of ``names`` that have a line; each has the color of its place among all.
    """
    shown = [name for name in names if name in drawn]
    colors = [SERIES[names.index(name) % len(SERIES)] for name in shown]
    x = alt.X("block:Q", title="behind block", axis=alt.Axis(tickMinStep=1, labelExpr=WHOLE))
    y = alt.Y("error:Q", title="relative error of hidden states", axis=alt.Axis(format=".3~p"))
    base = alt.Chart(alt.NamedData("blocks")).encode(x=x, y=y)
    tooltip = [
        alt.Tooltip("checkpoint:N"),
        alt.Tooltip("block:Q", title="behind block"),
        alt.Tooltip("error:Q", title="relative error", format=PERCENT),
    ]
    legend = alt.Legend(title=None, orient="top") if len(names) > 1 else None
    color = alt.Color(
        "checkpoint:N",
        sort=shown,
        scale=alt.Scale(domain=shown, range=colors),
        legend=legend,
    )
    line = base.mark_line(strokeWidth=2.5).encode(color=color)
    points = base.mark_point(filled=True, size=55, opacity=1).encode(color=color, tooltip=tooltip)
    return _spec(alt.layer(line, points).properties(width="container", height=240))


def times() -> dict[str, Any]:
    """Seconds by stage."""
    base = alt.Chart(alt.NamedData("stages")).encode(
        y=alt.Y("stage:N", sort=None, title=None),
        x=alt.X("seconds:Q", title="seconds", axis=alt.Axis(tickCount=5)),
        tooltip=[
            alt.Tooltip("stage:N"),
            alt.Tooltip("seconds:Q", format=".3~r"),
            alt.Tooltip("share:Q", title="of all", format=".1%"),
        ],
    )
    bars = base.mark_bar(color=SERIES[0], height={"band": 0.7})
    return _spec(bars.properties(width="container", height=alt.Step(24)))


def codes() -> dict[str, Any]:
    """How often each value of a layer's grid is taken; of 8 bits, 16 values together."""
    bars = (
        alt.Chart(alt.NamedData("codes"))
        .mark_bar(color=SERIES[0])
        .encode(
            x=alt.X("code:O", sort=None, title="code", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="of the weights", axis=alt.Axis(format="~p")),
            tooltip=[
                alt.Tooltip("code:O"),
                alt.Tooltip("share:Q", title="of the weights", format=PERCENT),
            ],
        )
    )
    return _spec(bars.properties(width="container", height=200))


def diagonal() -> dict[str, Any]:
    """The Hessian's diagonal, as means of runs of columns in the order of the sweep.

    A point stands where its run begins; the line (``edges``) goes on to where the run ends.
    """
    scale = alt.Scale(type="log", nice=False, padding=8)
    line = (
        alt.Chart(alt.NamedData("edges"))
        .mark_line(interpolate="step-after", strokeWidth=2, color=SERIES[0])
        .encode(
            x=alt.X("column:Q", title="column, in the order of the sweep").axis(
                labelOverlap=True, tickCount=5
            ),
            y=alt.Y("mean:Q", title="mean of diag H", scale=scale).axis(
                format="~g", labelOverlap=True, tickCount=4, grid=False
            ),
        )
    )
    points = (
        alt.Chart(alt.NamedData("runs"))
        .mark_point(filled=True, size=45, opacity=1, color=SERIES[0])
        .encode(
            x="column:Q",
            y="mean:Q",
            tooltip=[
                alt.Tooltip("column:Q", title="from column", format=",d"),
                alt.Tooltip("mean:Q", title="mean of diag H", format=".2~g"),
            ],
        )
    )
    return _spec(alt.layer(line, points).properties(width="container", height=200))


def _scale(values: Sequence[float], middle: float | None = None) -> dict[str, Any]:
    there = [value for value in values if value]
    low, high = min(there, default=1.0), max(there, default=1.0)
    if middle is not None:
        far = max(high / middle, middle / low, 1.01)
        domain = [middle / far, middle * far]
        return {"type": "log", "scheme": "blueorange", "domain": domain}
    if low > 0 and high > WIDE * low:
        return {"type": "log", "scheme": "viridis", "domain": [low, high]}
    return {"scheme": "viridis", "domain": [min(low, 0), high]}


def _legend(form: str, scale: Mapping[str, Any]) -> alt.Legend:
    legend = alt.Legend(
        format=form.replace(".3p", ".3~p"),
        titleLimit=300,
        orient="bottom",
        direction="horizontal",
        gradientLength=240,
    )
    if scale.get("type") == "log":
        legend["values"] = _marks(*scale["domain"])
    return legend


def _marks(low: float, high: float) -> list[float]:
    """Round numbers between two others, as far apart as logarithms, at most six; two at least."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{step}e{ten}") for ten in decades for step in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 6:
            break
    if len(found) < 2:
        return [float(f"{low * (high / low) ** (i / 4):.2g}") for i in range(5)]
    return found[:: -(-len(found) // 6)]


def _spec(chart: alt.LayerChart | alt.Chart | alt.FacetChart) -> dict[str, Any]:
    """What Vega reads."""
    import vl_convert

    made: Mapping[str, Any] = chart.to_dict()
    spec = {name: value for name, value in made.items() if name not in ("$schema", "config")}
    compiled: dict[str, Any] = vl_convert.vegalite_to_vega(spec, config=CONFIG)
    del compiled["$schema"]
    return compiled
