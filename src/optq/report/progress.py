"""Progress on stderr, so that stdout holds results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

stderr = Console(stderr=True)
Update = Callable[..., None]  # of how much is done, of how much, and a note


@contextmanager
def bar(title: str, shown: bool = True) -> Iterator[Update]:
    """A bar with time left while it runs; it leaves no line behind. Silent where no one looks."""
    shown = shown and stderr.is_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not shown) as live:
        task = live.add_task(title, total=None, note="")

        def update(done: float, total: float, note: str = "") -> None:
            live.update(task, completed=done, total=total, note=note)

        yield update
