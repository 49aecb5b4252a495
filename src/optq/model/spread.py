"""The experts of a bank over several ranks: what each read goes to the rank that solves it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from optq.model.inputs import Handed, HandedExperts
from optq.ranks import Ranks

Read = tuple[list[Handed], list[Handed]]  # in the quantized model, and in the other stream


class Spread:
    """``count`` experts, ``together`` of them at a time to each rank in turn.

    ``tokens`` says how many each got, on all ranks; ``quantized`` and ``full`` are what batches of
    this one handed over.
    """

    def __init__(
        self,
        ranks: Ranks,
        count: int,
        together: int,
        quantized: list[HandedExperts],
        full: list[HandedExperts],
    ) -> None:
        self.ranks, self.count, self.together = ranks, count, together
        self.quantized, self.full = quantized, full
        own = [0] * count
        for batch in quantized:
            for expert, handed in batch.of.items():
                own[expert] += 0 if handed.tokens is None else len(handed.tokens)
        self.tokens = [sum(each) for each in zip(*ranks.gather(own, "experts"), strict=True)]

    def steps(self) -> Iterator[range]:
        """The experts that all ranks solve at one time."""
        each = self.together * self.ranks.size if self.ranks.size > 1 else 1
        for first in range(0, self.count, each):
            yield range(first, min(first + each, self.count))

    def owner(self, expert: int) -> int:
        return expert // self.together % self.ranks.size

    def read(self, step: range) -> dict[int, Read]:
        """What those experts of a step read that this rank solves, in the order of the batches."""
        parcels: list[dict[int, Read]] = [{} for _ in range(self.ranks.size)]
        for expert in step:
            own = [batch.of[expert] for batch in self.quantized if expert in batch.of]
            other = [batch.of[expert] for batch in self.full if expert in batch.of]
            parcels[self.owner(expert)][expert] = own, other
        if self.ranks.size == 1:
            return parcels[0]
        sent = [{e: (_sent(a), _sent(b)) for e, (a, b) in each.items()} for each in parcels]
        came = self.ranks.exchange(sent, "experts")
        return {
            expert: (
                [h for each in came for h in each[expert][0]],
                [h for each in came for h in each[expert][1]],
            )
            for expert in parcels[self.ranks.rank]
        }


def _sent(handed: list[Handed]) -> list[Handed]:
    """The rows themselves, on the CPU; of the samples only how many there are."""
    return [
        Handed(
            each.first_sample,
            torch.zeros(1, dtype=torch.int64).expand(each.ids.shape),
            each.inputs.cpu().clone(),
            None if each.tokens is None else each.tokens.cpu().clone(),
        )
        for each in handed
    ]
