"""The processes of one run, which ``torchrun`` starts: which is which, and what they exchange.

Each is a *rank*. All do the same work on shares of it, in lockstep, so that each call here is made
by all of them, in the same order. With one process nothing is sent, and nothing costs time.
"""

from __future__ import annotations

import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optq.errors import OptqError, PeerError

# The longest that one rank may wait for another: while rank 0 reads the text, or writes. A process
# that dies closes its connections, which the others see at once.
PATIENCE = timedelta(hours=2)
GRACE = 2  # seconds in which a process that fails tells why, before the others end
UNIT = 64  # rows of a weight that stay together: what vector units sum side by side


@dataclass(eq=False)
class Ranks:
    """Process ``rank`` of ``size``. ``sent`` counts its bytes by the site and what they were."""

    rank: int = 0
    size: int = 1
    here: int = 1  # processes of the run on this machine
    site: str = ""  # under way
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    @property
    def last(self) -> int:
        return self.size - 1

    def bounds(self, count: int, unit: int = 1) -> list[slice]:
        """The share of each rank of so many things in a row, in whole units but for the last."""
        ends = [unit * (count // unit * rank // self.size) for rank in range(1, self.size)]
        return [slice(*pair) for pair in zip([0, *ends], [*ends, count], strict=True)]

    def own(self, count: int, unit: int = 1) -> slice:
        """This rank's share of them."""
        return self.bounds(count, unit)[self.rank]

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return self._reduced(torch.tensor(number), dist.ReduceOp.MIN)

    def total(self, number: int) -> int:
        """The sum of the ranks' numbers."""
        return self._reduced(torch.tensor(number), dist.ReduceOp.SUM)

    def share(self, made: Callable[[], Any]) -> Any:
        """What rank 0 makes, on all of them; tensors in it must be on the CPU."""
        if self.size == 1:
            return made()
        box = [made() if self.first else None]
        with self._together():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, own: Any, what: str) -> list[Any]:
        """What each rank brings, on all of them; tensors in it must be on the CPU."""
        return [own] if self.size == 1 else self.exchange([own] * self.size, what)

    def exchange(self, parcels: Sequence[Any], what: str) -> list[Any]:
        """A parcel to each rank, and those that came, by sender; tensors must be on the CPU."""
        received: list[Any] = [parcels[self.rank]] * self.size
        if self.size == 1:
            return received
        outgoing = [self._packed(parcel) for parcel in parcels]
        lengths = torch.tensor([len(each) for each in outgoing])
        every = [torch.empty_like(lengths) for _ in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        with self._together():
            dist.all_gather(every, lengths)
            incoming = {r: torch.empty(int(every[r][self.rank]), dtype=torch.uint8) for r in others}
            moves = [dist.P2POp(dist.isend, outgoing[rank], rank) for rank in others]
            moves += [dist.P2POp(dist.irecv, incoming[rank], rank) for rank in others]
            for move in dist.batch_isend_irecv(moves):
                move.wait()
        self._count(what, *(outgoing[rank] for rank in others))
        for rank in others:
            received[rank] = pickle.loads(bytes(incoming[rank].numpy()))
        return received

    def receive(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with what the rank before this one sends."""
        with self._together():
            dist.recv(tensor, self.rank - 1)

    def send(self, tensor: Tensor, what: str) -> Callable[[], None]:
        """Send a contiguous tensor to the next rank, and go on; what is returned waits for it."""
        with self._together():
            sending = dist.isend(tensor, self.rank + 1)
        self._count(what, tensor)
        return self._end_of(sending)

    def broadcast(self, tensor: Tensor, source: int, what: str) -> Callable[[], None]:
        """Overwrite a contiguous tensor with the rank ``source``'s; as :meth:`send`."""
        with self._together():
            sending = dist.broadcast(tensor, source, async_op=True)
        if self.rank == source:  # however the ranks pass it on
            self._count(what, *[tensor] * self.last)
        return self._end_of(sending)

    def _end_of(self, work: Any) -> Callable[[], None]:
        def end() -> None:
            with self._together():
                work.wait()

        return end

    def _reduced(self, number: Tensor, how: Any) -> int:
        if self.size > 1:
            with self._together():
                dist.all_reduce(number, how)
        return int(number)

    def _packed(self, parcel: Any) -> Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(parcel)), dtype=torch.uint8)

    def _count(self, what: str, *tensors: Tensor) -> None:
        self.sent[self.site, what] += sum(tensor.nbytes for tensor in tensors)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What another rank's end makes of a call: it says why, not this one."""
        try:
            yield
        except torch.OutOfMemoryError:  # which is one, too
            raise
        except RuntimeError as error:
            raise self.ended() from error

    def ended(self) -> PeerError:
        return PeerError(
            f"process {self.rank + 1} of {self.size} ends", "another one did, and says why"
        )


def launched() -> bool:
    """Whether torchrun started this process, and others with it."""
    return dist.is_available() and dist.is_torchelastic_launched() and _world() > 1


def local_rank() -> int:
    """The number of this process on its machine, where torchrun started it."""
    return int(os.environ["LOCAL_RANK"])


@contextmanager
def together(device: torch.device) -> Iterator[Ranks]:
    """The ranks of this run, for as long as it lasts; one, where torchrun did not start it.

    Of ranks that fail one tells its error. The others end with :class:`optq.errors.PeerError`.
    """
    if not launched():
        yield Ranks()
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    # The store is older than the processes, which torchrun may have started again: each of their
    # runs has keys of its own in it, counted from when they were started.
    started = f"optq, restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    store = dist.PrefixStore(f"{started}, run {store.add(f'{started}: runs of {rank}', 1)}", store)
    own = Ranks(rank, size, int(os.environ["LOCAL_WORLD_SIZE"]))
    with own._together():
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield own
    except OptqError as error:
        if not isinstance(error, PeerError) and _first_to_fail(store):
            raise
        # torchrun ends all when it sees the first end: that is to be the one with something to say.
        with suppress(KeyboardInterrupt):
            time.sleep(GRACE)
        raise own.ended() from error
    except KeyboardInterrupt as error:
        if own.first:
            raise
        raise own.ended() from error
    finally:
        dist.destroy_process_group()


def _world() -> int:
    return int(os.environ["WORLD_SIZE"])


def _first_to_fail(store: Any) -> bool:
    """Whether no other rank has told of an error: all of them find what is wrong with an option."""
    try:
        return int(store.add("failed", 1)) == 1
    except RuntimeError:  # who kept it is gone
        return True
