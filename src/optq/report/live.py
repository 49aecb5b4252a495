"""A quantization while it runs: a bar on a terminal; elsewhere a line as each block is done."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from optq.record import LayerRecord
from optq.report import progress, said
from optq.report.tables import duration

Say = Callable[[str], None]


class Live:
    """What a run's callbacks tell, called as :class:`optq.runner.Runner` calls them.

    A block is done when the run speaks of another, or ends. What is left takes as long as those
    that this run has done, without the first, if it can be: what comes before it is not told apart.
    ``clock`` gives seconds.
    """

    def __init__(
        self,
        bar: progress.Update,
        say: Say,
        clock: Callable[[], float] = time.monotonic,
        baseline: str = "rounding",
    ) -> None:
        self.bar, self.say, self.clock, self.baseline = bar, say, clock, baseline
        self.last = self.begun = clock()  # the last step, and the current block
        self.took: list[float] = []  # seconds, of each block that is done
        self.step: Any = None  # the last one of the current block
        self.block, self.every = _Errors(baseline), _Errors(baseline)
        bar(0, 1, "starting")

    def begin(self) -> None:
        """The run begins: what the command needed for itself is none of its time."""
        self.bar(0, 1, "reading model and text")
        self.begun = self.clock()

    def reading(self, done: int, total: int) -> None:
        """Text is drawn for calibration."""
        self.bar(0, 1, f"reading text: {done} of {total}")
        self.begun = self.clock()

    def solved(self, step: Any) -> None:
        """An :class:`optq.quantize.Progress`."""
        where = f"block {step.block + 1} of {step.blocks}"
        if not step.layers:  # before the run: which widths a budget has for it
            self.bar(step.block, step.blocks, f"{where}, {_inside(step.site)}: at each width")
            self.begun = self.clock()
            return
        if self.step is not None and step.block != self.step.block:
            self.end()
        self.step, self.last = step, self.clock()
        if step.tuned is None:
            self.block.add(step.layers)
            self.every.add(step.layers)
            told = f"{_inside(step.site)}: error so far {self.every}"
        else:
            told = said.gained(step.tuned)
        told = ", ".join([where, told, *self._left(step.blocks - step.block)])
        self.bar(step.block, step.blocks, told)

    def tuning(self, step: int, steps: int, divergence: float) -> None:
        """The scales of all blocks are tuned, which are done."""
        self.end()
        told = f"tuning, step {step} of {steps}: divergence {divergence:.4f}"
        self.bar(step, steps, told)
        self.say(told)

    def end(self) -> None:
        """The current block is done, if there is one."""
        if self.step is None:
            return
        step, self.step = self.step, None
        self.took.append(self.last - self.begun)
        told = [f"block {step.block + 1} of {step.blocks}: relative error {self.block}"]
        told += [said.gained(step.tuned)] if step.tuned else []
        told += [duration(self.took[-1]), *self._left(step.blocks - step.block - 1)]
        self.say(", ".join(told))
        self.begun, self.block = self.last, _Errors(self.baseline)

    def _left(self, blocks: int) -> list[str]:
        took = self.took[1:] or self.took
        return [f"about {duration(blocks * sum(took) / len(took))} left"] if took and blocks else []


@contextmanager
def quantizing(shown: bool = True, baseline: str = "rounding") -> Iterator[Live]:
    """What is told of a run on stderr, as long as it lasts; nothing if it is not ``shown``.

    Its errors stand beside those of the ``baseline``.
    """
    told = shown and not progress.is_watched()

    def say(line: str) -> None:
        if told:
            print(line, file=sys.stderr, flush=True)

    with progress.bar("quantizing", shown, timed=False) as bar:
        live = Live(bar, say, baseline=baseline)
        yield live
        live.end()


class _Errors:
    """The relative error of some layers together, and the baseline's if it is another."""

    def __init__(self, baseline: str) -> None:
        self.baseline = baseline
        self.error = self.rounding = self.energy = 0.0

    def add(self, layers: Sequence[LayerRecord]) -> None:
        for layer in layers:
            self.error += layer.error
            self.rounding += layer.rtn_error
            self.energy += layer.error / layer.relative_error if layer.relative_error else 0.0

    def __str__(self) -> str:
        own, other = (
            f"{100 * each / (self.energy or 1):.2g}%" for each in (self.error, self.rounding)
        )
        return own if own == other else f"{own} ({self.baseline} {other})"


def _inside(site: str) -> str:
    """The name of a site in its block."""
    return re.sub(r"^.*?\.\d+\.", "", site, count=1)
