"""The sites of the block under way: found by a scout, handed over by the batches.

Which layers share a site is found out, not declared: a scout, a batch of one sample, goes through
each block just before the others and records which layers read the same tensor: the same object
at the same version, held alive meanwhile; never equal contents and never an address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from greenlet import GreenletExit, getcurrent
from torch import Tensor, nn

from optq.errors import ModelError
from optq.model.batch import Batch
from optq.model.blocks import Block, Layer, Site


class Sites:
    """What batches meet on their way through the model, as the hooks of its modules see it."""

    def __init__(self, model: Any, blocks: list[Block]) -> None:
        self.model, self.blocks = model, blocks
        self._of: dict[Layer, Site] = {}
        self._seen: list[tuple[Tensor, int, Site]] = []  # the scout's inputs, held alive

    def found(self) -> None:
        """The scout has gone through the block."""
        self._seen.clear()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Batches pause before blocks and sites, and end before the output embedding."""
        handles = []
        for block in self.blocks:
            handles.append(_pre_hook(block.module, self._entering, block))
            handles.extend(_pre_hook(layer.module, self._reading, layer) for layer in block.layers)
        head = self.model.get_output_embeddings()
        if head is not None:
            handles.append(_pre_hook(head, self._leaving, None))
        try:
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
        x = args[0] if args else next(iter(kwargs.values()))
        if batch.kind == "scout":
            self._record(layer, x)
            return
        site = self._of.get(layer)
        if site is None:  # the scout did not come by here: it follows where this batch was last
            site = self._new_site(layer)
            here = [past.place for past in batch.handed if past.block is site.block]
            site.place = max(here, default=-1) + 0.5
        if layer in batch.called:
            return  # a layer belongs to its first call
        batch.called.add(layer)
        if site not in batch.handed and not layer.solved:
            batch.hand(site, x)
        elif site in batch.handed and batch.handed[site]() is not x:
            raise ModelError(
                f"{layer.name} reads another tensor than {site.layers[0].name} for some samples",
                "report this model: its sites depend on the text",
            )

    def _leaving(self, batch: Batch, _: None, args: tuple, kwargs: dict) -> None:
        raise GreenletExit  # nothing after the blocks is needed

    def _record(self, layer: Layer, x: Tensor) -> None:
        layer.calls += 1
        if layer in self._of:
            return
        for tensor, version, site in self._seen:
            if tensor is x and version == x._version:
                site.layers.append(layer)
                self._of[layer] = site
                return
        self._seen.append((x, x._version, self._new_site(layer)))

    def _new_site(self, layer: Layer) -> Site:
        block = next(block for block in self.blocks if layer in block.layers)
        self._of[layer] = site = Site(block, [layer], place=len(self._of))
        return site


def _pre_hook(module: nn.Module, act: Callable[..., None], what: Any) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        batch = getcurrent()
        if isinstance(batch, Batch):
            act(batch, what, args, kwargs)
        # Returns None: a value would replace the module's arguments.

    return module.register_forward_pre_hook(hook, with_kwargs=True)
