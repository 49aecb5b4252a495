"""Experts that call a function of ours, for the time of a run: see :mod:`optq.model.experts`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from optq.model.experts import Bank, Copies, own_forward

OURS = "optq"  # among transformers' experts implementations


@contextmanager
def called_through(
    banks: Sequence[Bank], function: Callable[[Bank, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Inside, ``function`` is called for a bank in the place of its module's own forward."""
    if not banks:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    bank_of_module = {id(bank.module): bank for bank in banks}

    def ours(module: nn.Module, x: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        bank = bank_of_module.get(id(module))
        if bank is None:  # left dense
            return own_forward(module)(module, x, *routing, **named)
        return function(bank, x, *bank.routing(x, *routing, *named.values()))

    apart = [bank.module for bank in banks if isinstance(bank, Copies)]
    others = [bank.module for bank in banks if not isinstance(bank, Copies)]
    configs = {id(module.config): module.config for module in others}.values()
    before = [(config, config._experts_implementation) for config in configs]
    ALL_EXPERTS_FUNCTIONS[OURS] = ours
    try:
        for module in apart:
            module.forward = partial(ours, module)
        for config in configs:
            config._experts_implementation = OURS
        yield
    finally:
        for module in apart:
            del module.forward
        for config, implementation in before:
            config._experts_implementation = implementation
        del ALL_EXPERTS_FUNCTIONS[OURS]
