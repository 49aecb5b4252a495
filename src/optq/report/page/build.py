"""The page itself: facts, specs, styles and a library of charts in one file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from optq import __version__
from optq.errors import OutputError
from optq.record import RunRecord
from optq.report.page import beside, charts, layers, pack, summary, words
from optq.report.page.known import Several

FILE = "optq_report.html"
SIGN = '<meta name="generator" content="OPTQ'  # by which a report knows another
BUNDLE = """
import sys, vl_convert
sys.stdout.buffer.write(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").encode())
"""
HEAD = 1000  # characters at the start of a report, among which the sign stands


def page(several: Several) -> str:
    """The HTML of one report."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("optq.report.page", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    environment.filters |= words.FILTERS

    def inlined(name: str) -> str:
        return loader.get_source(environment, name)[0]

    every = [summary.of(*each) for each in zip(several.every, several.names, strict=True)]
    facts = data(several)
    text = environment.get_template("page.html").render(
        version=__version__,
        generator=Markup(SIGN),
        first=every[0],
        every=every,
        beside=beside.of(several),
        facts=facts,
        css=Markup(inlined("page.css")),
        js=Markup("\n".join(map(inlined, ("draw.js", "layers.js", "page.js")))),
        library=Markup(drawing() if facts["charts"] else ""),
        data=Markup(_json(facts)),
    )
    return text


def _json(value: object) -> str:
    """As a script may hold it: nothing in it ends the script."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@cache
def drawing() -> str:
    """Vega-Embed with Vega inside, which vl-convert carries: it sets ``window.vegaEmbed``.

    Made in a process of its own: in this one no other thread would run for more than a second.
    """
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", BUNDLE]
    # Of a session of its own: Ctrl-C is for the command.
    made = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    ).stdout
    return re.sub("</(script)", r"<\\/\1", made, flags=re.IGNORECASE)  # it would end the script


def data(several: Several) -> dict[str, Any]:
    """What the page's script reads; ``charts`` is empty where there is no record."""
    first = several.every[0]
    found: dict[str, Any] = {"charts": {}, "metrics": [], "names": several.names}
    if first.times is not None:
        seconds = summary.stages(first.times)
        total = sum(each["seconds"] for each in seconds) or 1.0
        found["stages"] = [{**each, "share": each["seconds"] / total} for each in seconds]
        found["charts"]["times"] = charts.times()
    found["depth"] = [
        row
        for each, name in zip(several.every, several.names, strict=True)
        if each.record is not None
        for row in summary.depth(each.record, name)
    ]
    if found["depth"]:
        drawn = {row["checkpoint"] for row in found["depth"]}
        found["charts"]["depth"] = charts.depth(several.names, drawn)
    if first.record is None or not first.record.layers:
        return found
    record, over = _gaining(first.record), layers.baseline(first.record)
    places = layers.Places(record.layers)
    cells = layers.cells(record.layers, places)
    kinds, blocks = places.kind_labels(), places.block_labels()
    found |= layers.columns(record, places)
    found |= {"cells": cells, "blocks": list(places.blocks), "kinds": list(places.kinds)}
    found |= {"block_labels": blocks, "kind_labels": kinds}
    found["over"] = over
    found["metrics"] = _metrics(several, record, cells, places)
    if any(cell["left"] is not None for cell in cells):
        found["charts"]["gain"] = charts.gain(kinds, over)
    if any(place.expert is not None for place in places.every):
        errors = [layer.relative_error for layer in record.layers]
        of_experts = [kinds[index] for name, index in places.kinds.items() if "*" in name]
        found["charts"]["experts"] = charts.experts(errors, of_experts, over)
    if found["codes"]:
        found["charts"]["codes"] = charts.codes()
    if found["levels"]:
        found["charts"]["diagonal"] = charts.diagonal()
    return found


def _gaining(record: RunRecord) -> RunRecord:
    """The record; of a baseline itself without its error, over which it gains nothing."""
    if record.method not in ("rtn", "magnitude"):
        return record
    bare = [layer.model_copy(update={"rtn_error": 0.0}) for layer in record.layers]
    return record.model_copy(update={"layers": bare})


def _metrics(
    several: Several, record: RunRecord, cells: list[dict[str, Any]], places: layers.Places
) -> list[dict[str, Any]]:
    """What the heat map can show; numbers of other checkpoints are added to ``cells``."""
    labels, over = (places.block_labels(), places.kind_labels()), layers.baseline(record)
    found = []

    def show(title: str, field: str, form: str, middle: float | None = None) -> None:
        values = [cell[field] for cell in cells if cell.get(field) is not None]
        if values:
            spec = charts.heat(title, field, values, *labels, form, over, middle)
            found.append({"title": title, "field": field, "spec": spec})

    show("relative error", "error", charts.PERCENT)
    show(f"of {over}'s error", "left", charts.PERCENT)
    show("codes at the ends of the grid", "ends", charts.PERCENT)
    if len({layer.wbits for layer in record.layers}) > 1:
        show("bits", "bits", "d")
    for index, (other, name) in enumerate(zip(several.every, several.names, strict=True)):
        if index == 0 or other.record is None:
            continue
        theirs: Mapping[tuple[str, str], float] = _errors(other.record)
        for cell in cells:
            where = [*places.blocks][cell["block"]], [*places.kinds][cell["kind"]]
            cell[f"error{index}"] = theirs.get(where)
            ratio = cell["error"] and (theirs.get(where) or 0.0) / cell["error"]
            cell[f"ratio{index}"] = pack.rounded(ratio) or None
        show(f"relative error of {name}", f"error{index}", charts.PERCENT)
        show(f"error of {name}, over this one's", f"ratio{index}", ".3~r", 1.0)
    return found


def _errors(record: RunRecord) -> dict[tuple[str, str], float]:
    """The relative error of each cell of a heat map, by the names of block and kind."""
    places = layers.Places(record.layers)
    blocks, kinds = [*places.blocks], [*places.kinds]
    return {
        (blocks[cell["block"]], kinds[cell["kind"]]): cell["error"]
        for cell in layers.cells(record.layers, places)
    }


def check(path: Path, force: bool) -> None:
    """Refuse, before any work, a place where no report may go: an older report is replaced."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "name a file with --out")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}", "make it, or name another one")
    if path.exists() and not force and not is_report(path):
        raise OutputError(
            f"{path} exists and is no report", "name another with --out, or replace it with --force"
        )


def is_report(path: Path) -> bool:
    """Whether a file is a report of ours."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return SIGN in file.read(HEAD)
    except OSError:
        return False


def write(path: Path, text: str) -> None:
    """Write the page whole, or leave what was there. Raises :class:`OutputError`."""
    part = path.with_name(f".{path.name}.partial")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError.of(path, error, "--out") from error
