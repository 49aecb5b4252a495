"""A batch as a coroutine (a greenlet): it pauses inside a forward and takes torch's modes along."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor

from optq.model.blocks import Block, Site
from optq.model.inputs import Handed, HandedExperts
from optq.model.layer import Layer


@dataclass(frozen=True)
class Passed:
    """What a block was called with and what it made of that; ``whole``: it changed no argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Any
    whole: bool


class Batch(greenlet):
    """``forward``, whatever it is, of the token ids of some samples; ``kind`` names its stream."""

    def __init__(
        self, forward: Callable[[Tensor], object], ids: Tensor, first_sample: int, kind: str
    ) -> None:
        super().__init__(lambda: forward(ids))
        self.ids, self.first_sample, self.kind = ids, first_sample, kind
        # Where it is paused: before a block, or before a site whose input it hands over.
        self.before: Block | None = None
        self.site: Site | None = None
        self.input: Handed | HandedExperts | None = None
        self.handed: dict[Site, weakref.ref[Tensor]] = {}
        self.calls: Counter[Layer] = Counter()
        self.again: set[Site] = set()  # handed over before the block under way began anew
        self.short: torch.OutOfMemoryError | None = None  # why it is paused inside the block
        self.stays = False  # at the end of the next block, where it leaves behind:
        self.passed: Passed | None = None
        self.repeats = False  # the block, with other weights: nothing is to be found out
        self.leaves = False  # behind the next block what that has made, here:
        self.left: Tensor | None = None

    def wait(self, block: Block) -> None:
        """Sleep, inside the coroutine, before ``block``."""
        self.before = block
        self._pause()

    def hand(self, site: Site, x: Tensor) -> None:
        """Sleep, inside the coroutine, until ``site`` is solved from ``x`` and its like."""
        self.handed[site] = weakref.ref(x)
        self.site, self.input = site, Handed(self.first_sample, self.ids, x)
        self._pause()

    def hand_experts(self, site: Site, x: Tensor, of: dict[int, Handed]) -> None:
        """The same for all experts of a bank: ``of`` has the input of each, ``x`` all tokens."""
        self.site = site
        self.input = HandedExperts(Handed(self.first_sample, self.ids, x), of)
        self._pause()

    def call(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a block; where the device has no memory for that, sleep and call it again."""
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        before = [each._version for each in tensors]
        calls, handed = self.calls.copy(), dict(self.handed)
        while True:
            try:
                made = block(*args, **kwargs)
                if self.stays:
                    self.stays, whole = False, [x._version for x in tensors] == before
                    self.passed = Passed(args, kwargs, made, whole)
                    self._pause()
                    self.passed = None
                    if self.repeats:
                        made = None  # makes room
                        made = block(*args, **kwargs)
                self.repeats = False
                if self.leaves:
                    self.leaves, self.left = False, handed_on(made)
                return made
            except torch.OutOfMemoryError as error:
                if [each._version for each in tensors] != before:
                    raise  # it changes its own input: a second call would not do the same
                self.short = error.with_traceback(None)  # whose frames hold what it has made
            self.again, self.calls = self.handed.keys() - handed.keys(), calls.copy()
            self.handed = dict(handed)
            self._pause()
            self.short = None

    def unwind(self) -> None:
        """Leave the forward where it is paused, if it is."""
        if self and not self.dead:
            self.throw(GreenletExit)

    def _pause(self) -> None:
        with default_modes():
            self.parent.switch()
        self.before = self.site = self.input = None  # the input that was handed over may go


def handed_on(made: Any) -> Tensor:
    """The hidden states among what a block returns."""
    if isinstance(made, Tensor):
        return made
    return next(each for each in made if isinstance(each, Tensor))


@contextmanager
def default_modes() -> Iterator[None]:
    """No autocast and no gradients inside; whatever was set before is back afterwards.

    They belong to the thread: a forward that pauses inside ``with torch.autocast(..)`` would leave
    autocast on for the solver and for every other coroutine.
    """
    with ExitStack() as stack:
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.no_grad())
        torch.clear_autocast_cache()  # it holds casts of weights that may change meanwhile
        try:
            yield
        finally:
            torch.clear_autocast_cache()
