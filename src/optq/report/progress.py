"""Progress on stderr, so that stdout holds results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

stderr = Console(stderr=True)
Update = Callable[..., None]  # of how much is done, of how much, and a note


def is_watched() -> bool:
    """Whether stderr is a terminal that can show what changes."""
    return stderr.is_terminal and not stderr.is_dumb_terminal


class _Noted(Progress):
    """The bar on one line, and what it says of itself on the next: 80 columns hold no more."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            note = str(task.fields["note"])
            yield Text(note, style="dim", no_wrap=True, overflow="ellipsis")


@contextmanager
def bar(title: str, shown: bool = True, timed: bool = True) -> Iterator[Update]:
    """A bar with time left while it runs; it leaves no line behind. Silent where no one looks.

    Without ``timed`` the notes say how much time is left.
    """
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    if timed:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    with _Noted(
        *columns,
        console=stderr,
        transient=True,
        disable=not (shown and is_watched()),
        speed_estimate_period=inf,  # one step may take minutes
    ) as live:
        task = live.add_task(title, total=None, note="")

        def update(done: float, total: float, note: str = "") -> None:
            live.update(task, completed=done, total=total, note=note)

        yield update
