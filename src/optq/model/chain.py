"""The sums of a site over several ranks: each adds its batches to what the rank before it has.

A sum of floating-point numbers depends on the order. Here it is that of the samples, however many
ranks there are: the batches are split over the ranks in runs, and a part of the sum, some rows of
it, goes from rank to rank, each adding the products of its own batches one by one. While one rank
adds to a part the one before it adds to the next. The last one hands each finished part to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from optq.core.hessian import TILE, Chunks, Hessian, add_drift
from optq.ranks import Ranks

Piece = tuple[Tensor, Tensor, Tensor]  # all inputs, and those of the same tokens in both streams


def chained(
    ranks: Ranks,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
    pieces: Callable[[], Iterable[Piece]],
    drifts: bool,
) -> tuple[Hessian, Tensor | None]:
    """The Hessian of all ranks' ``pieces``; with ``drifts`` the sum of :func:`add_drift` too.

    They are read anew for each part, unless they are few: they may lie on another device.
    """
    hessian = Hessian(columns, device, dtype)
    chunks = Chunks(lambda: (inputs for inputs, _, _ in pieces()), dtype)
    hessian.tokens = ranks.total(chunks.tokens)
    parts = [(hessian.part(first), first) for first in hessian.rows()]
    # The smallest first: the other ranks wait for it.
    _pass_on(ranks, reversed(parts), chunks.add_to)
    if not drifts:
        return hessian, None
    drift = torch.zeros(columns, columns, device=device, dtype=dtype)

    def add(part: Tensor, first: int) -> None:
        for _, x, y in pieces():
            if len(x):
                add_drift(part, x, y, slice(first, first + TILE))

    _pass_on(ranks, [(drift[first : first + TILE], first) for first in hessian.rows()], add)
    return hessian, drift


def _pass_on(
    ranks: Ranks, parts: Iterable[tuple[Tensor, int]], add: Callable[[Tensor, int], None]
) -> None:
    """Fill each of the ``parts``, which are zero, with what all ranks add to it in their turn."""
    waits, filled = [], []
    for part, first in parts:
        running = torch.zeros_like(part, memory_format=torch.contiguous_format)
        if ranks.rank:
            ranks.receive(running)
        add(running, first)
        total = running
        if ranks.rank < ranks.last:
            waits.append(ranks.send(running, "sums"))
            total = torch.empty_like(running)
        waits.append(ranks.broadcast(total, ranks.last, "finished sums"))
        filled.append((part, total))
    for wait in waits:
        wait()
    for part, total in filled:
        part.copy_(total)
