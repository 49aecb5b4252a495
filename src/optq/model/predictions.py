"""What a model predicts on a text, after the model itself has gone.

Predictions of a large vocabulary are too many to keep, and two models at once may be too much. So
what is kept of one is what its head reads (a few thousand numbers a token), and the head: logits
are made of them anew, some windows at a time. Whatever the model does behind its head, such as a
cap on logits, is its own code: its forward runs without its body, and its head is given what was
kept. A model that does not fit into memory passes block by block.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent
from jaxtyping import Float, Int
from torch import Tensor, nn

from optq.errors import ModelError, OutputError
from optq.model.activations import SHARE
from optq.model.batch import Batch
from optq.model.blocks import Block
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.memory import free
from optq.model.shards import open_model
from optq.model.weights import Weights

BATCH_TOKENS = 4096  # that go through the model at once, one window at least
Windows = Int[Tensor, "windows seqlen"]
Update = Callable[[int, int], None]  # windows done, of how many


def at_once(windows: Tensor) -> int:
    """How many windows go through a model together."""
    return max(1, BATCH_TOKENS // windows.shape[1])


class Head:
    """``model`` without its body, which is let go: what its head reads becomes logits."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.head = model, _head(model)
        self.device, self.dtype = device, model.dtype  # which packed weights alone do not say
        # Not all that have a prefix call their body by it (Llama 4's text model).
        bodies = [n for n in (model.base_model_prefix, "model") if n in model._modules]
        if not bodies:
            raise _headless(model)
        body = bodies[0]
        model.__dict__[body] = self.nothing = _Nothing(model._modules.pop(body))

    @torch.no_grad()
    def __call__(
        self, hidden: Float[Tensor, "batch seqlen hidden"]
    ) -> Float[Tensor, "batch seqlen vocabulary"]:
        hidden = hidden.to(self.device)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        handle = self.head.register_forward_pre_hook(lambda _, args: (hidden, *args[1:]))
        self.nothing.hidden = hidden
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        except AttributeError as error:
            raise ModelError(
                f"{type(self.model).__name__} cannot predict from what its head reads: {error}",
                "leave --against out, and report this model",
            ) from error
        finally:
            handle.remove()
            self.nothing.hidden = None


@dataclass(frozen=True)
class Predictions:
    """Of one text: ``hidden`` is what the head read of each window."""

    head: Head
    hidden: Float[Tensor, "windows seqlen hidden"]

    def logits(self, first: int, count: int) -> Float[Tensor, "count seqlen vocabulary"]:
        """Of ``count`` windows from ``first`` on, on the head's device."""
        return self.head(self.hidden[first : first + count])


def predictions(
    model: Any, texts: Sequence[Windows], progress: Update = lambda *_: None
) -> list[Predictions]:
    """Those of a model in memory, on its device, on each of ``texts``; only its head is left of it.

    Raises :class:`ModelError` for a model without a head, ``OutputError`` where what it reads finds
    no room.
    """
    head, every = _head(model), sum(map(len, texts))
    found, done = [], 0
    with torch.no_grad(), _stopping_at(head) as reached:
        for windows in texts:
            kept = _Kept(windows)
            for first in range(0, len(windows), at_once(windows)):
                ids = windows[first : first + at_once(windows)]
                try:
                    model(input_ids=ids.to(model.device, torch.int64), use_cache=False)
                except _Reached:
                    kept.put(first, reached.pop())
                done += len(ids)
                progress(done, every)
            found.append(kept.hidden)
    only = Head(model, model.device)
    return [Predictions(only, hidden) for hidden in found]


def streamed(
    checkpoint: Checkpoint,
    find: Callable[[Any], list[Block]],
    texts: Sequence[Windows],
    device: torch.device,
    progress: Update = lambda *_: None,
) -> list[Predictions]:
    """The same of a plain checkpoint, one block of it in memory at a time.

    ``find`` finds the blocks in its skeleton; ``progress`` is called with blocks. What windows hold
    between blocks goes to files where there is no room for it.
    """
    model, blocks, shards = open_model(checkpoint, find)
    head, every = _head(model), [_Kept(windows) for windows in texts]
    batches, starts = list[Tensor](), dict[int, tuple[_Kept, int]]()
    first = 0
    for windows, kept in zip(texts, every, strict=True):
        for start in range(0, len(windows), at_once(windows)):
            batches.append(windows[start : start + at_once(windows)].to(torch.int64))
            starts[first] = kept, start
            first += len(batches[-1])

    def keep(_: Any, args: Any) -> None:
        batch = getcurrent()
        if isinstance(batch, Batch) and batch.kind != "scout":
            kept, start = starts[batch.first_sample]
            kept.put(start, args[0])

    weights = Weights(model, blocks, device, keep=False, shards=shards)
    flow = Flow(
        model,
        blocks,
        batches,
        weights,
        solve=lambda sites: None,
        done=lambda block, error: progress(block.index + 1, len(blocks)),
        restore=lambda block: iter(()),  # all is known: nothing is solved
    )
    handle = head.register_forward_pre_hook(keep)
    try:
        flow.run()
    finally:
        handle.remove()
    weights.outside.fetch(head)
    only = Head(model, device)
    return [Predictions(only, kept.hidden) for kept in every]


def _head(model: Any) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        raise _headless(model)
    return head


def _headless(model: Any) -> ModelError:
    return ModelError(
        f"{type(model).__name__} has no head whose predictions could be compared",
        "measure its perplexity alone, with optq eval and without --against",
    )


class _Kept:
    """What the head reads of ``windows``, in memory, or in an unnamed file where that is short."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows
        self.hidden = windows.new_empty(0)  # of a width that is not known yet

    def put(self, first: int, hidden: Tensor) -> None:
        if not len(self.hidden):
            shape = (*self.windows.shape, hidden.shape[-1])
            self.hidden = _room(torch.empty(shape, dtype=hidden.dtype, device="meta"))
        self.hidden[first : first + len(hidden)] = hidden


def _room(like: Tensor) -> Tensor:
    if like.nbytes <= SHARE * free(torch.device("cpu")):
        return torch.empty_like(like, device="cpu")
    try:
        with tempfile.TemporaryFile() as file:
            file.truncate(like.nbytes)
            if hasattr(os, "posix_fallocate"):  # a disk that is full says so now, and not later
                os.posix_fallocate(file.fileno(), 0, like.nbytes)
            mapped = mmap.mmap(file.fileno(), like.nbytes)
        return torch.frombuffer(mapped, dtype=like.dtype).view(like.shape)
    except OSError as error:
        raise OutputError(
            f"what is kept of the predictions has no room in {tempfile.gettempdir()}",
            "make room, or choose a shorter text",
        ) from error


class _Reached(Exception):  # noqa: N818  no error: how a forward ends early
    """The head is reached, and nothing behind it is needed."""


@contextmanager
def _stopping_at(head: Any) -> Iterator[list[Tensor]]:
    """Inside, a forward ends before the head; what that would have read is put into the list."""
    reached: list[Tensor] = []

    def stop(_: Any, args: Any) -> None:
        reached.append(args[0])
        raise _Reached

    handle = head.register_forward_pre_hook(stop)
    try:
        yield reached
    finally:
        handle.remove()


class _Nothing:
    """In the place of a model's body, or of a part of it: called, it gives ``hidden``.

    What it was set to stays: some models multiply their logits by a number that the body has.
    """

    def __init__(self, body: nn.Module) -> None:
        self.hidden: Tensor | None = None
        self._parts = {name for name, _ in body.named_children()}
        own = vars(body).items()
        self._set = {n: v for n, v in own if n == "config" or isinstance(v, int | float | str)}

    def __call__(self, *_: Any, **__: Any) -> _Given:
        assert self.hidden is not None
        return _Given(self.hidden)

    def __getattr__(self, name: str) -> Any:
        if name in self._parts:
            return self  # some models call a part of their body
        try:
            return self._set[name]
        except KeyError:
            raise AttributeError(f"the model asks for its body's {name} behind its head") from None


class _Given:
    """What a body returns, as far as what comes behind it asks."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()
