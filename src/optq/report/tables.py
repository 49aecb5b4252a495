"""Tables for stdout. Every function takes plain values and prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from optq.record import Choice
from optq.report.found import lines_of

# What users call their files is not markup.
stdout = Console(highlight=False, markup=False, emoji=False)
if not stdout.is_terminal:  # a file or a pipe has no width: nothing is folded
    stdout = Console(highlight=False, markup=False, emoji=False, width=1000)

BARS = ""  # the header of a column that a table can do without


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def columns(*names: str, left: tuple[int, ...] = (0,)) -> Table:
    """An empty table; the columns ``left`` are of words, all others of numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, name in enumerate(names):
        is_left = index in left  # numbers are not cut
        table.add_column(
            name, justify="left" if is_left else "right", no_wrap=not is_left, overflow="fold"
        )
    return table


def write(table: Table, spare: Sequence[str] = ()) -> None:
    """Elsewhere than on a terminal without blanks that end a line.

    Where a terminal is too narrow, without bars, and then without the columns ``spare``, in turn.
    """
    if stdout.is_terminal:
        for name in (BARS, *spare):
            wanted = Measurement.get(stdout, stdout.options.update_width(1000), table).maximum
            if wanted > stdout.width:
                table.columns = [each for each in table.columns if each.header != name]
        stdout.print(table)
        return
    with stdout.capture() as text:
        stdout.print(table)
    for line in text.get().splitlines():
        print(line.rstrip())


def bar(value: float, most: float, width: int = 30, color: str = "default") -> Bar | Text:
    """Blocks; number signs where the stream's encoding may have no blocks."""
    if stdout.options.ascii_only:
        return Text("#" * round(width * value / most))
    return Bar(most, 0, value, width=width, color=color)


def facts(pairs: Mapping[str, object]) -> None:
    """Names on the left, values on the right."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, str(value))
    write(table)


def checkpoint(what: Mapping[str, Any]) -> None:
    """What :func:`optq.formats.describe.describe` found."""
    answers = {True: "yes", False: "no", None: "not known"}
    lines = {each["tool"]: f"{answers[each['loads']]}: {each['why']}" for each in what["loads"]}
    for name, value in what.items():
        if name in ("loads", "layers", "evaluated"):
            continue
        if name.endswith("bytes"):
            lines[name.replace("bytes", "size").replace("_", " ")] = size(value)
        elif isinstance(value, Mapping):
            lines[name] = ", ".join(f"{key} {each}" for key, each in value.items())
        elif value is not None:
            lines[name.replace("_", " ")] = str(value)
    facts(lines | lines_of(what.get("evaluated", {})))
    if what["layers"]:
        stdout.print()
        layers(what["layers"])


def planned(plan: Any) -> None:
    """What :class:`optq.plan.Plan` says of a run."""
    sites = "found in the run" if plan.sites is None else str(plan.sites)
    experts = f", {plan.experts} experts" if plan.experts else ""
    lines = {
        "quantized": f"{plan.layers} layers in {plan.blocks} blocks{experts}; sites: {sites};"
        f" {plan.weights / 1e6:.1f} million weights, {plan.bits_per_weight:.2f} bits each",
        "result": f"{size(plan.bytes)}: {size(plan.packed_bytes)} packed,"
        f" {size(plan.dense_bytes)} as they are",
        "disk": f"{size(plan.disk)} at the peak, {size(plan.disk_free)} free",
        "memory": f"{size(plan.memory)} at the peak, {size(plan.memory_available)} available",
    }
    if plan.device != "cpu":
        there = size(plan.device_memory_available)
        lines[plan.device] = f"{size(plan.device_memory)} at the peak, {there} available"
    lines["time"] = f"about {duration(plan.seconds)}, without reading text: an estimate"
    facts(lines)
    stdout.print()
    table = columns("stays dense", "tensors", "bytes", "", left=(0, 3))
    for row in plan.dense:
        names = ", ".join(row.names[:2]) + (", .." if len(row.names) > 2 else "")
        table.add_row(row.why, str(row.tensors), size(row.bytes), names)
    write(table)
    for line in (*plan.notices, *plan.warnings()):
        stdout.print(f"note: {line}")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plus(value: float, error: float | None, form: str = ".4f") -> str:
    """A number with its standard error, where it has one."""
    return f"{value:{form}}" + ("" if error is None else f" ±{error:{form.lstrip('+')}}")


def chosen(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """What a program is told of a choice of widths."""
    return [choice.model_dump() | {"sensitivity": choice.sensitivity} for choice in choices]


def widths(choices: Sequence[Mapping[str, Any]]) -> None:
    """Who got what width and why; the bar is the divergence that is left, in millinats a token."""
    most = max(choice["divergence"][choice["wbits"]] for choice in choices) or 1.0
    every = sorted({wbits for choice in choices for wbits in choice["divergence"]})
    prefix = shared(name for choice in choices for name in choice["layers"])
    title, names = f"layers ({prefix}..)", (f"at {wbits}" for wbits in every)
    table = columns(title, "weights", "bits", "error", "sensitivity", *names, BARS, left=(0,))
    for choice in choices:
        first, *more = choice["layers"]
        found = expert_in(first)
        name = ", ".join([first, *(each.rpartition(".")[2] for each in more)])
        if found:
            name = f"{found[1]}: {len(choice['layers'])} layers of experts"
        left = choice["divergence"]
        table.add_row(
            name.removeprefix(prefix),
            f"{choice['weights'] / 1e6:.2f}M",
            str(choice["wbits"]),
            f"{choice['errors'][choice['wbits']]:.2%}",
            f"{choice['sensitivity']:.3f}",
            *(f"{1e3 * left[wbits]:.3g}" if wbits in left else "-" for wbits in every),
            bar(left[choice["wbits"]], most, width=20),
        )
    write(table)
    stdout.print("at 2, ..: how far predictions diverge at 2 bits, in millinats a token, estimated")
    stdout.print("sensitivity: nats a token for each unit of relative error")
    stdout.print()


def stages(seconds: Mapping[str, float]) -> None:
    """Where the time went."""
    total = seconds["total"] or 1.0
    table = columns("stage", "seconds", BARS, left=(0, 2))
    parts = {stage: value for stage, value in seconds.items() if stage != "total"}
    parts["other"] = max(total - sum(parts.values()), 0)
    for stage, value in parts.items():
        table.add_row(stage, f"{value:.1f}", bar(value, total))
    table.add_row("total", f"{total:.1f}", "")
    write(table)


def expert_in(name: str) -> re.Match[str] | None:
    """The parts of an expert's projection's name: it has a number of its own after its block's."""
    return re.fullmatch(r"(.+\.\d+\..+)\.(\d+)\.(\w+)", name)


def layers(records: Sequence[Mapping[str, Any]]) -> None:
    """Errors by layer; the bar is the relative error, on the scale of the largest.

    Of the experts of a block each projection has one row: the worst one's.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found = expert_in(record["name"])
        rows.setdefault(f"{found[1]}.*.{found[3]}" if found else record["name"], []).append(record)
    records = [
        dict(max(same, key=lambda each: each["relative_error"]))
        | {"name": f"{name}, worst of {len(same)}" if len(same) > 1 else name}
        for name, same in rows.items()
    ]
    most = max((record["relative_error"] for record in records), default=1.0) or 1.0
    prefix = shared(record["name"] for record in records)
    pruned = any(record.get("sparsity") is not None for record in records)
    beside = "of magnitude's" if pruned else "of rounding's"
    names = (f"layer ({prefix}..)", "rows x cols", "error", "relative", beside, BARS)
    table = columns(*names, left=(0, 5))
    for record in records:
        rounding = record["rtn_error"]
        table.add_row(
            record["name"].removeprefix(prefix),
            f"{record['rows']} x {record['cols']}",
            f"{record['error']:.3g}",
            f"{record['relative_error']:.2%}",
            f"{record['error'] / rounding:.0%}" if rounding else "-",
            bar(record["relative_error"], most, width=20),
        )
    write(table)


def shared(names: Iterable[str]) -> str:
    """The parts that all names begin with."""
    every = [name.split(".") for name in names]
    first, last = min(every), max(every)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return "".join(f"{part}." for part in first[:same])


def completions(prompt: str, names: Sequence[str], made: Sequence[tuple[str, object]]) -> None:
    """What models made of the same prompt, and how fast."""
    table = Table(padding=(0, 1))
    for name in names:
        table.add_column(name, overflow="fold", ratio=1)
    table.add_row(*(prompt + text for text, _ in made), end_section=True)
    table.add_row(*(str(speed) for _, speed in made))
    write(table)


def speed(report: Any) -> None:
    """What :func:`optq.evaluate.speed.measure_speed` found."""
    packed, dense = report.packed, report.dense
    table = columns(f"{report.device}, {report.dtype}", "packed", "dense", "ratio")
    for name, one, other in (
        ("prefill, tokens/s", packed.prefill, dense.prefill),
        ("decode, tokens/s", packed.decode, dense.decode),
    ):
        table.add_row(name, f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}x")
    ratio = f"{packed.bytes / dense.bytes:.3f}x"
    table.add_row("quantized layers", size(packed.bytes), size(dense.bytes), ratio)
    write(table)
    stdout.print()
    names = ("rows x cols", "layers", "kernel", "packed", "dense", "ratio", "of bandwidth")
    table = columns(*names, left=(0, 2))
    for shape in report.shapes:
        table.add_row(
            f"{shape.rows} x {shape.cols}",
            str(shape.layers),
            shape.kernel,
            f"{shape.microseconds:.0f} us",
            f"{shape.dense_microseconds:.0f} us",
            f"{shape.dense_microseconds / shape.microseconds:.2f}x",
            f"{shape.bandwidth:.0%}",
        )
    write(table)
    stdout.print(f"memory bandwidth {size(report.bandwidth)}/s, measured in this run")
