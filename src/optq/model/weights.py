"""Who holds the tensors of a model's blocks, and on which device: nobody else needs to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optq.errors import ModelError
from optq.model.blocks import Block
from optq.model.layer import Layer
from optq.model.memory import trim
from optq.model.outside import Outside
from optq.model.shards import Place, Shards, places


class Weights:
    """The weights of ``model``: a block's are on ``device`` from its fetch to its drop.

    They come from ``shards`` as far as the model lacks them. With ``keep`` they then stay in
    memory, on the CPU; without it they are let go.
    """

    def __init__(
        self,
        model: Any,
        blocks: list[Block],
        device: torch.device,
        keep: bool = True,
        shards: Shards | None = None,
    ) -> None:
        self.model, self.blocks, self.device, self.keep = model, blocks, device, keep
        self.shards, self.outside = shards, Outside(model, blocks, device, keep, shards)
        layers = [layer for block in blocks for layer in block.layers]
        self._versions = {layer: layer.parameter._version for layer in layers}
        # What blocks share, a module or a parameter, is needed until the last of them is done.
        last = {p: block for block in blocks for p in block.module.parameters()}
        self._until: dict[Block, set[Place]] = {block: set() for block in blocks}
        for place in {place for block in blocks for place in places(block.module)}:
            self._until[last[getattr(*place)]].add(place)
        self._originals: dict[nn.Parameter, Tensor] = {}

    def fetch(self, block: Block) -> None:
        """Make the block ready to run, its layers' weights ready to be written to.

        Raises :class:`ModelError` where the model itself has changed them.
        """
        for layer in block.layers:
            if layer.parameter._version != self._versions[layer]:
                raise ModelError(
                    f"the model changes {layer.name} while it runs",
                    "models that rescale their own weights cannot be quantized",
                )
        read = self.shards.read(block) if self.shards else set()
        if read:
            trim()  # what they were made of
        # Memory of its own: what is written to a mapped file's pages stays until the whole file is
        # let go, and the quantized weights of a model larger than memory with it.
        if self.device.type == "cpu":
            for parameter in {layer.parameter for layer in block.layers} - read:
                parameter.data = parameter.data.clone()
        block.module.to(self.device)

    def drop(self, block: Block) -> None:
        """The block is not needed any more."""
        for module, name in self._until[block]:
            parameter = getattr(module, name)
            self._originals.pop(parameter, None)
            if not self.keep:
                empty = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
                setattr(module, name, empty)
        if self.keep:
            block.module.to("cpu")
        else:
            trim()

    def complete(self) -> None:
        """A model that is kept has the weights of blocks, too, that nobody fetched."""
        if self.keep and self.shards:
            for block in self.blocks:
                self.shards.read(block)

    def hold_originals(self, layers: list[Layer]) -> None:
        """Keep what the layers hold now, for :meth:`originals`, at most until a drop."""
        for parameter in {layer.parameter for layer in layers} - self._originals.keys():
            self._originals[parameter] = parameter.data.clone()  # of experts: all of them at once

    def let_originals_go(self, layers: list[Layer], block: Block) -> bool:
        """Forget what these layers held; not, and False, where a later block shares them."""
        if not all((layer.module, layer.attribute) in self._until[block] for layer in layers):
            return False
        for layer in layers:
            self._originals.pop(layer.parameter, None)
        return True

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Inside, every layer has the weights that were held."""
        self._swap_originals()
        try:
            yield
        finally:
            self._swap_originals()

    def _swap_originals(self) -> None:
        for parameter, data in self._originals.items():
            self._originals[parameter], parameter.data = parameter.data, data
