"""Tokens that stand in for those that an expert lacks, out of the others of its block."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optq.model.blocks import Site
from optq.model.inputs import HandedExperts
from optq.ranks import Ranks


class Others:
    """The tokens that all batches, of all ranks, brought to the experts of a ``site``."""

    def __init__(self, site: Site, handed: list[HandedExperts], ranks: Ranks = Ranks()) -> None:
        self.site, self.handed, self.ranks = site, handed, ranks
        self.device = site.layers[0].parameter.device

    def sample(self, expert: int, count: int, owner: int = 0) -> Float[Tensor, "some hidden"]:
        """So many that went elsewhere, or all: those to which the router likes ``expert`` best.

        Where no router is found they are taken evenly. The other ranks than the ``owner`` of the
        expert get none.
        """
        elsewhere = []
        for batch in self.handed:
            own = batch.of[expert].tokens if expert in batch.of else None
            free = torch.ones(len(batch.every.inputs), dtype=torch.bool, device=self.device)
            if own is not None:
                free[own.to(free.device)] = False
            elsewhere.append(free)
        own = torch.cat(elsewhere) if elsewhere else torch.empty(0, dtype=torch.bool)
        all_free, scores, before = self._of_all(own, expert)
        free = all_free.nonzero().flatten()
        if scores is None:
            chosen = free[:: max(1, len(free) // count)][:count]
        else:
            chosen = free[scores[free].topk(min(count, len(free))).indices]
        picked = torch.zeros(len(all_free), dtype=torch.bool, device=free.device)
        picked[chosen] = True
        parts = picked[before : before + len(own)].split([len(each) for each in elsewhere])
        rows = [b.every.inputs.to(self.device)[p] for b, p in zip(self.handed, parts, strict=True)]
        if self.ranks.size == 1:
            return torch.cat(rows)
        sent = [each.cpu() for each in rows]
        received = self.ranks.exchange(
            [sent if rank == owner else [] for rank in range(self.ranks.size)], "experts"
        )
        return torch.cat([row for rows in received for row in rows] or [own[:0]]).to(self.device)

    def _of_all(self, free: Tensor, expert: int) -> tuple[Tensor, Tensor | None, int]:
        """Of all ranks' tokens, in order, whether they are free, and the router's scores.

        And how many come before this rank's.
        """
        scores = None if self._scores is None else self._scores[:, expert]
        if self.ranks.size == 1:
            return free, scores, 0
        told = self.ranks.gather((free.cpu(), None if scores is None else scores.cpu()), "experts")
        before = sum(len(each) for each, _ in told[: self.ranks.rank])
        free = torch.cat([each for each, _ in told])
        if any(each is None for _, each in told):
            return free, None, before
        return free, torch.cat([each for _, each in told]), before

    @cached_property
    def _scores(self) -> Float[Tensor, "tokens experts"] | None:
        """What the router gives each expert for each token."""
        router: Any = self._router()
        if router is None:
            return None
        weight = router.weight.T.float()
        if not self.handed:
            return weight[:0]
        every = (batch.every.inputs.to(self.device).float() for batch in self.handed)
        logits = torch.cat([inputs @ weight for inputs in every])
        bias = getattr(router, "bias", None)
        return (logits if bias is None else logits + bias.float()).softmax(-1)

    def _router(self) -> nn.Module | None:
        """The module beside the experts that has one row for each of them."""
        bank, block = self.site.bank, self.site.block
        assert bank is not None
        beside = bank.name.rpartition(".")[0].removeprefix(block.name).strip(".")
        shape = (len(bank.inner), bank.inner[0][0].shape[1])
        for module in block.module.get_submodule(beside).modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.shape == shape:
                return module
        return None
