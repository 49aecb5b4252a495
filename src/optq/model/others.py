"""Tokens that stand in for those that an expert lacks, out of the others of its block."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optq.model.blocks import Site
from optq.model.inputs import HandedExperts


class Others:
    """The tokens that all batches brought to the experts of a ``site``."""

    def __init__(self, site: Site, handed: list[HandedExperts]) -> None:
        self.site, self.handed = site, handed
        self.device = site.layers[0].parameter.device

    def sample(self, expert: int, count: int) -> Float[Tensor, "some hidden"]:
        """So many that went elsewhere, or all: those to which the router likes ``expert`` best.

        Where no router is found they are taken evenly.
        """
        elsewhere = []
        for batch in self.handed:
            own = batch.of[expert].tokens if expert in batch.of else None
            free = torch.ones(len(batch.every.inputs), dtype=torch.bool, device=self.device)
            if own is not None:
                free[own.to(free.device)] = False
            elsewhere.append(free)
        free = torch.cat(elsewhere).nonzero().flatten()
        if self._scores is None:
            chosen = free[:: max(1, len(free) // count)][:count]
        else:
            chosen = free[self._scores[free, expert].topk(min(count, len(free))).indices]
        picked = torch.zeros(sum(map(len, elsewhere)), dtype=torch.bool, device=free.device)
        picked[chosen] = True
        parts = picked.split([len(each) for each in elsewhere])
        tokens = [
            b.every.inputs.to(self.device)[p] for b, p in zip(self.handed, parts, strict=True)
        ]
        return torch.cat(tokens)

    @cached_property
    def _scores(self) -> Float[Tensor, "tokens experts"] | None:
        """What the router gives each expert for each token."""
        router: Any = self._router()
        if router is None:
            return None
        every = (batch.every.inputs.to(self.device).float() for batch in self.handed)
        logits = torch.cat([inputs @ router.weight.T.float() for inputs in every])
        bias = getattr(router, "bias", None)
        return (logits if bias is None else logits + bias.float()).softmax(-1)

    def _router(self) -> nn.Module | None:
        """The module beside the experts that has one row for each of them."""
        bank, block = self.site.bank, self.site.block
        assert bank is not None
        beside = bank.name.rpartition(".")[0].removeprefix(block.name).strip(".")
        shape = (len(bank.inner), self.handed[0].every.inputs.shape[1])
        for module in block.module.get_submodule(beside).modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.shape == shape:
                return module
        return None
