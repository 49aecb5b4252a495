"""What paused batches hold: on the device as far as it fits, then in host memory, then in files.

A batch that pauses keeps tensors alive: what its block was called with, the residual, the input
that it hands over. They are found in the frames of its coroutine. Those of a batch for which there
is no room are copied elsewhere, and each tensor object is pointed at its copy, so the batch goes on
with the same values and knows nothing of it. A tensor that was not found, or that is the
model's, just stays where it is.

The rejected option is to let such a batch go back to the entrance of its block and to call the
block again for each site: with four sites that is more than one further forward pass, where writing
and reading a file costs a few percent (docs/log.md). It is what happens to a batch for which a
device has no memory in the middle of its forward.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optq.errors import OutputError
from optq.model.batch import Batch
from optq.model.memory import free

SMALL = 2**16  # bytes of a tensor that is not worth moving
SHARE = 0.5  # of what is free when a run begins, for batches: the rest is for the solver
ALIGNED = 64
DEPTH = 4  # of containers in containers
Alike = list[Tensor]  # tensors that share one storage


class Activations:
    """Keeps what paused batches hold within ``limit`` bytes on ``device``.

    The default is a share of what is free, of the host's memory for each of so many ``processes``.
    What a GPU has no room for goes to host memory, as far as that is free, and then to unnamed
    files in ``folder``, which end with the process. ``most`` has the largest number of bytes so far
    in each place.
    """

    def __init__(
        self,
        device: torch.device,
        limit: int | None = None,
        folder: Path | None = None,
        processes: int = 1,
    ) -> None:
        self.device, self.folder = device, folder
        on_host, host = device.type != "cpu", int(SHARE * free(torch.device("cpu")) / processes)
        self._host_limit = host if on_host else 0
        self.limit = limit or 0
        if limit is None:
            self.limit = int(SHARE * free(device)) if on_host else host
        self._held: dict[Batch, int] = {}
        self._away: dict[Batch, list[weakref.ref[Tensor]]] = {}  # to bring back to a GPU
        self._host: dict[Batch, int] = {}
        self._maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
        self.shared: set[int] = set()  # the ids of tensors that are not the batches' own
        self.most = {"memory": 0, "host": 0, "files": 0}

    def take(self, batch: Batch) -> None:
        """``batch`` has paused, or has ended: move what it holds if there is no room for it."""
        self._held[batch] = sum(_size(alike) for alike in self._here(batch))
        if batch.dead:
            del self._held[batch]
        elif sum(self._held.values()) > self.limit:
            self._move(batch)
        self.most["memory"] = max(self.most["memory"], sum(self._held.values()))

    def give(self, batch: Batch) -> None:
        """``batch`` is about to go on: what a GPU needs of it comes back."""
        self._host.pop(batch, None)
        gone = [each for ref in self._away.pop(batch, ()) if (each := ref()) is not None]
        for alike in _by_storage(gone).values():
            _point(alike, _bytes(alike).to(self.device))

    def halve(self) -> bool:
        """The device had less room than was thought: leave half. False: there is none to leave."""
        held = sum(self._held.values())
        self.limit = held // 2
        for batch in sorted(self._held, key=lambda batch: -self._held[batch]):
            if sum(self._held.values()) > self.limit:
                self._move(batch)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return sum(self._held.values()) < held

    def read(self) -> None:
        """What lies in files was read, and need not stay in memory until somebody wants the room"""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _here(self, batch: Batch) -> list[Alike]:
        """What the batch holds on the device, by storage."""
        own = [each for each in _tensors(batch) if id(each) not in self.shared]
        found = _by_storage(own).items()
        return [
            alike
            for pointer, alike in found
            if alike[0].device.type == self.device.type and pointer not in self._maps
            if _size(alike) >= SMALL
        ]

    def _move(self, batch: Batch) -> None:
        here = self._here(batch)
        size = sum(_size(alike) for alike in here)
        if not size:
            return
        if sum(self._host.values()) + size <= self._host_limit:
            self._host[batch] = size
            for alike in here:
                _point(alike, _bytes(alike).cpu())
            self.most["host"] = max(self.most["host"], sum(self._host.values()))
        else:
            self._to_file(here)
        if self.device.type != "cpu":
            self._away[batch] = [weakref.ref(each) for alike in here for each in alike]
        self._held[batch] -= size

    def _to_file(self, here: list[Alike]) -> None:
        starts, end = [], 0
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                for alike in here:
                    file.seek(end)
                    starts.append(end)
                    file.write(_bytes(alike).cpu().numpy().data)
                    end = -(-file.tell() // ALIGNED) * ALIGNED
                file.truncate(end)
                file.flush()
                mapped = mmap.mmap(file.fileno(), end)
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise OutputError(
                f"what batches hold cannot be kept in {where}: {error.strerror or error}",
                "make room, raise --activation-memory, or choose fewer --nsamples",
            ) from error
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        self._maps[whole.data_ptr()] = mapped
        for alike, start in zip(here, starts, strict=True):
            _point(alike, whole, start)
        files = sum(map(len, self._maps.values()))
        self.most["files"] = max(self.most["files"], files)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    """What the functions in which a batch is paused have in their variables."""
    frame: Any = batch.gr_frame
    while frame is not None:
        for value in frame.f_locals.values():
            yield from _inside(value, DEPTH)
        frame = frame.f_back


def _inside(value: Any, depth: int) -> Iterator[Tensor]:
    if type(value) is Tensor:  # no parameter: others hold those
        yield value
    elif depth and isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _inside(each, depth - 1)


def _by_storage(tensors: Iterator[Tensor] | list[Tensor]) -> dict[int, Alike]:
    found: dict[int, dict[int, Tensor]] = {}
    for each in tensors:
        if each.layout == torch.strided and each.device.type != "meta":
            found.setdefault(each.untyped_storage().data_ptr(), {})[id(each)] = each
    return {pointer: list(alike.values()) for pointer, alike in found.items() if pointer}


def _size(alike: Alike) -> int:
    return alike[0].untyped_storage().nbytes()


def _bytes(alike: Alike) -> Tensor:
    """The whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=alike[0].device).set_(
        alike[0].untyped_storage()
    )


@torch.no_grad()
def _point(alike: Alike, to: Tensor, start: int = 0) -> None:
    """Let the tensors be views of the bytes ``to`` from ``start`` on, as they were of their own."""
    for each in alike:
        offset = start // each.itemsize + each.storage_offset()
        view = torch.empty(0, dtype=each.dtype, device=to.device)
        each.data = view.set_(to.untyped_storage(), offset, each.shape, each.stride())
