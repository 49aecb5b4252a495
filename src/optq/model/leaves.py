"""Weights that get gradients, one layer's at a time: those of all of them are never held."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from optq.model.experts import Bank
from optq.model.layer import Layer

Taken = Callable[[Layer, Tensor], None]


@contextmanager
def learning(
    module: nn.Module, layers: Collection[Layer], banks: Sequence[Bank], take: Taken
) -> Iterator[None]:
    """Inside, a backward pass through ``module`` hands each layer's gradient to ``take``.

    It is ``[rows, columns]``, and goes afterwards; no other parameter gets one. Of ``banks`` each
    expert has its own: transformers' code would fill one of all experts for each of them.
    """
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    leaves: dict[tuple[Any, ...], tuple[Tensor, list[Layer]]] = {}
    for layer in layers:
        leaf = layer.parameter if layer.expert is None else layer.whole
        leaves.setdefault((layer.parameter, layer.expert), (leaf, []))[1].append(layer)
    module.requires_grad_(False)
    with ExitStack() as undo:
        for parameter, asked in before.items():
            undo.callback(parameter.requires_grad_, asked)
        for leaf, of_leaf in leaves.values():
            leaf.requires_grad_()
            handle = leaf.register_post_accumulate_grad_hook(partial(_hand, of_leaf, take))
            undo.callback(handle.remove)
        for bank in banks:
            for attribute in (bank.first, "down_proj"):
                whole = getattr(bank.module, attribute)
                keys = [(whole, expert) for expert in range(len(bank.inner))]
                if own := [leaves[key][0] for key in keys if key in leaves]:
                    bank.slices[attribute] = own  # else no token came by, and they are dense
            undo.callback(bank.slices.clear)
        yield


def _hand(layers: list[Layer], take: Taken, leaf: Tensor) -> None:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    for layer in layers:
        take(layer, layer.part(gradient))
