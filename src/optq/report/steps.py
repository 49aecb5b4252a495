"""What to do next: the last line of every command that ends in a table."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from optq.report.tables import stdout

# The options of `optq quantize` that make a row of `optq compare`.
OPTIONS = {
    "rtn": ("--method", "rtn"),
    "plain": ("--plain",),
    "no-qep": ("--no-qep",),
    "gptq": (),
    "best": ("--best",),
    "w8a8": ("--abits", 8),
    "smoothquant": ("--method", "smoothquant"),
    "llm-int8": ("--method", "llm-int8"),
}
UNCALIBRATED = ("llm-int8",)


def show(step: str) -> None:
    """``step`` as it can be copied: a terminal may wrap it, nothing else does."""
    stdout.print(f"next: {step}", soft_wrap=True)


def command(*words: object) -> str:
    """``optq ..`` as a shell takes it."""
    return shlex.join(["optq", *map(str, words)])


def after_comparison(
    model: str, rows: Sequence[Mapping[str, Any]], same: Mapping[str, object]
) -> str:
    """The run that gives the row of the lowest perplexity; of equal ones, the smallest.

    ``same`` are options of all rows, None where one was left out.
    """
    quantized = [row for row in rows[1:] if not row.get("sparsity")] or rows[1:]
    row = min(quantized, key=lambda row: (row["perplexity"], row["bytes"]))
    bits = "--bits-per-weight" if row["method"] == "budget" else "--wbits"
    words: list[object] = [*OPTIONS.get(row["method"], ()), bits, row["wbits"]]
    words += [] if row.get("abits") else ["--groupsize", row["groupsize"]]
    if row["method"] in UNCALIBRATED:
        same = {name: same.get(name) for name in ("skip", "dtype")}
    for name, value in same.items():
        words += [f"--{name}", value] if value is not None else []
    return command("quantize", model, "OUT", *words)


def after_evaluation(models: Sequence[str], made: Sequence[str], against: str | None = None) -> str:
    """See the report of what was quantized or pruned; quantize what was not."""
    if made:
        dense = () if against is None else ("--against", against)
        return command("report", made[0], *dense)
    return command("quantize", models[0], "OUT")


def after_inspection(model: str, what: Mapping[str, Any]) -> str:
    """Quantize what is not, measure what is, and see the report of what is measured."""
    if "quantized_layers" not in what and not what.get("layers"):
        return command("quantize", model, "OUT")
    if what.get("evaluated", {}).get("texts"):
        return command("report", model)
    text = what.get("calibration", {}).get("text")
    return command("eval", model, *(("--text", "demo") if text == "demo" else ()))
