"""The sites of the block under way: found by a scout, handed over by the batches.

Which layers share a site is found out, not declared: a scout, a batch of one sample, goes through
each block just before the others and records which layers read the same tensor: the same object
at the same version, held alive meanwhile; never equal contents and never an address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import takewhile
from typing import Any
from weakref import ref

from greenlet import GreenletExit, getcurrent
from torch import Tensor, nn

from optq.errors import ModelError
from optq.model.batch import Batch
from optq.model.blocks import Block, Site
from optq.model.experts import Bank
from optq.model.experts_call import called_through
from optq.model.inputs import Handed
from optq.model.layer import Layer


class Sites:
    """What batches meet on their way through the model, as the hooks of its modules see it."""

    def __init__(
        self,
        model: Any,
        blocks: list[Block],
        source: Callable[[Batch, Site, Tensor], None] = lambda *_: None,
    ) -> None:
        self.model, self.blocks = model, blocks
        self.source = source  # is told of each input that the scout is about to read
        self.block: Block | None = None  # under way
        self.order: list[Site] = []  # of the block under way
        self._of: dict[Layer, Site] = {}
        self._seen: list[tuple[Tensor, int, Site]] = []  # the scout's inputs, held alive

    def begin(self, block: Block) -> None:
        """``block`` is under way: the scout goes through it next."""
        self.block = block
        self._of.clear()

    def arrange(self, block: Block) -> None:
        """Give each site its place, before any batch runs; a layer the scout missed is one too.

        A site must be solved after all that can run before it, or it is solved before all batches
        are there. Sites that the scout saw stand in the order in which it did; a layer that it did
        not come by follows the layer before it in the module tree, unless the one behind it is
        closer kin (another expert of one list) or runs earlier than both: then it precedes that.
        Too early does no harm where all batches pass what should have come first.
        """
        order = [site for _, _, site in self._seen]
        self._seen.clear()
        bank_of = {layer: bank for bank in block.banks for layer in bank.layers}
        before: Layer | None = None
        for index, layer in enumerate(block.layers):
            if layer not in self._of:
                behind = next((each for each in block.layers[index:] if each in self._of), None)
                after = 0 if before is None else order.index(self._of[before]) + 1
                ahead = len(order) if behind is None else order.index(self._of[behind])
                close, closer = _kinship(layer, before), _kinship(layer, behind)
                first = closer > close or (closer == close and ahead < after - 1)
                place, bank = ahead if first else after, bank_of.get(layer)
                sites = self._bank_sites(block, bank) if bank else [Site(block, [layer])]
                self._of |= dict.fromkeys(sites[0].layers, sites[0])
                order[place:place] = sites
            before = layer
        for place, site in enumerate(order):
            site.place = place
        self.order = order

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Batches pause before blocks and sites, and end before the output embedding."""
        handles = []
        for block in self.blocks:
            handles.append(_pre_hook(block.module, self._entering, block))
            plain = (layer for layer in block.layers if layer.expert is None)
            handles.extend(_pre_hook(layer.module, self._reading, layer) for layer in plain)
        head = self.model.get_output_embeddings()
        if head is not None:
            handles.append(_pre_hook(head, self._leaving, None))
        banks = [bank for block in self.blocks for bank in block.banks]
        try:
            with called_through(banks, self._experts), _calling(self.blocks):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, batch: Batch, block: Block, args: tuple, kwargs: dict) -> None:
        from transformers import Cache

        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ModelError(
                f"{block.name} is given a key-value cache although none was asked for",
                "report this model: its calibration would not be repeatable",
            )
        batch.wait(block)

    def _reading(self, batch: Batch, layer: Layer, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs[next(iter(signature(layer.module.forward).parameters))]
        batch.calls[layer] += 1
        layer.calls = max(layer.calls, batch.calls[layer])
        if batch.calls[layer] > 1 or self.block is None:
            return  # a layer belongs to its first call
        if batch.kind == "scout":
            self._record(self.block, layer, x, batch)
            return
        site = self._of.get(layer)
        if site is None:
            return  # of an earlier block: solved with it, or dense
        if site in batch.handed:
            if batch.handed[site]() is not x:
                raise ModelError(
                    f"{layer.name} reads another tensor than {site.layers[0].name}"
                    " for some samples",
                    "report this model: its sites depend on the text",
                )
        elif not layer.solved:
            batch.hand(site, x)
        elif site in batch.again:
            batch.handed[site] = ref(x)
        elif batch.kind == "quantized":  # what the other stream brings late has no part in drift
            raise ModelError(
                f"{layer.name} is reached by some samples after it was solved from others",
                "leave it dense with --skip, and report this model",
            )

    def _experts(self, bank: Bank, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """All experts of one call: what they compute, with a pause before each projection."""
        batch = getcurrent()
        routed = bank.routed(index)
        reads = isinstance(batch, Batch) and not batch.repeats
        if reads:
            if batch.kind == "scout" and self.block is not None:
                for site in self._bank_sites(self.block, bank):
                    self._seen.append((x.new_empty(0), 0, site))
            every = bank.every(x)
            copies = {
                e: (tokens, x, partial(bank.read, x, e, tokens))
                for e, (_, tokens) in routed.items()
            }
            self._experts_reading(batch, bank.inner, every, copies)
        inside = bank.inside(x, routed)
        if reads:
            inputs = {e: (tokens, inside[e], None) for e, (_, tokens) in routed.items()}
            self._experts_reading(batch, bank.down, every, inputs)
        return bank.combine(x, routed, inside, weights)

    def _experts_reading(
        self,
        batch: Batch,
        experts: list[list[Layer]],
        x: Tensor,
        inputs: Mapping[int, tuple[Tensor, Tensor, Callable[[], Tensor] | None]],
    ) -> None:
        layers = [layer for own in experts for layer in own]
        first, site = layers[0], self._of.get(layers[0])
        batch.calls[first] += 1
        for layer in layers:
            layer.calls = max(layer.calls, batch.calls[first])
        if site is not None and site.let_go and batch.kind == "full":
            raise ModelError(
                f"the experts of {first.name} are called again for some samples only",
                "leave them dense with --skip, and report this model",
            )
        if site is None or self.block is None or batch.kind == "scout" or batch.calls[first] > 1:
            return
        if not first.solved:
            who = batch.first_sample, batch.ids
            of = {e: Handed(*who, own, tokens, copy) for e, (tokens, own, copy) in inputs.items()}
            batch.hand_experts(site, x, of)
        elif batch.kind == "quantized" and site not in batch.again:
            raise ModelError(
                f"the experts of {first.name} are reached by some samples after they were solved",
                "leave them dense with --skip, and report this model",
            )

    def _bank_sites(self, block: Block, bank: Bank) -> list[Site]:
        sites = []
        for experts in (bank.inner, bank.down):
            layers = [layer for own in experts for layer in own]
            sites.append(site := Site(block, layers, bank=bank, experts=experts))
            self._of |= dict.fromkeys(layers, site)
        return sites

    def _leaving(self, batch: Batch, _: None, args: tuple, kwargs: dict) -> None:
        raise GreenletExit  # nothing after the blocks is needed

    def _record(self, block: Block, layer: Layer, x: Tensor, batch: Batch) -> None:
        if layer.solved:  # with an earlier block
            return
        same = (site for seen, version, site in self._seen if seen is x and version == x._version)
        site = next(same, None)
        if site is None:
            site = Site(block, [])
            self._seen.append((x, x._version, site))
            self.source(batch, site, x)
        site.layers.append(layer)
        self._of[layer] = site


@contextmanager
def _calling(blocks: list[Block]) -> Iterator[None]:
    """Batches call blocks so that they can do it again."""
    modules = list({block.module: None for block in blocks})

    def calls(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            batch = getcurrent()
            if isinstance(batch, Batch) and batch.kind != "scout":
                return batch.call(own, *args, **kwargs)
            return own(*args, **kwargs)

        return call

    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = calls(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _kinship(layer: Layer, other: Layer | None) -> int:
    """How many modules hold both, from the model down; -1 where there is no other."""
    if other is None:
        return -1
    pairs = zip(layer.name.split("."), other.name.split("."), strict=False)
    return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])


def _pre_hook(module: nn.Module, act: Callable[..., None], what: Any) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        batch = getcurrent()
        if isinstance(batch, Batch) and not batch.repeats:
            act(batch, what, args, kwargs)
        # Returns None: a value would replace the module's arguments.

    return module.register_forward_pre_hook(hook, with_kwargs=True)
