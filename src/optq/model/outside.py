"""What a model has outside its blocks, in memory and on the device only while it is used.

Embeddings are needed until every batch has come to the first block, and the head not at all: the
batches end before it. Where something is called again later, as per-layer embeddings are, a hook
brings it back; so nothing is known here of any model's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optq.model.blocks import Block
from optq.model.shards import Shards


class Outside:
    """The parameters outside ``blocks``; what ``shards`` can read again is not kept elsewhere.

    With ``keep`` they are all there in the end, on the CPU.
    """

    def __init__(
        self,
        model: Any,
        blocks: list[Block],
        device: torch.device,
        keep: bool,
        shards: Shards | None,
    ) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self.keep, self.shards = keep, shards
        self._called: set[nn.Module] = set()
        self._gone: set[nn.Parameter] = set()
        self._names: dict[nn.Parameter, str] = {}  # on disk
        self._before: dict[nn.Parameter, Tensor] = {}  # of those that have no such name

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, embeddings, norms and tables are on the device, until they are let go."""
        inside = {id(m) for block in self.blocks for m in block.module.modules()}
        head = self.model.get_output_embeddings()
        modules = {n: m for n, m in self.model.named_modules() if id(m) not in inside}
        outside = [module for module in modules.values() if module is not head]
        needed = {p for module in outside for p in module.parameters(recurse=False)}
        for module in modules.values():
            for attribute, parameter in module.named_parameters(recurse=False):
                name = self.shards.outside.get((module, attribute)) if self.shards else None
                if name is not None:
                    self._names[parameter] = name
        self._before = {p: p.data for p in needed if p not in self._names}
        for parameter in self._names.keys() - needed:
            self._let_go(parameter)
        for parameter in needed:
            parameter.data = parameter.data.to(self.device)
        _move_buffers(outside, self.device)
        # Those that hold blocks are running all the time.
        around = {n for block in self.blocks for n in _prefixes(block.name)}
        handles = [
            module.register_forward_pre_hook(self._calling)
            for name, module in modules.items()
            if name not in around and module is not head
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, data in self._before.items():
                parameter.data = data
            _move_buffers(self.model.modules(), "cpu")
        for parameter in self._names:
            if not self.keep:
                self._let_go(parameter)
            elif parameter in self._gone or parameter.device.type != "cpu":
                self._bring_back(parameter, torch.device("cpu"))

    def let_go(self) -> None:
        """What was called up to now is not needed, unless it is called again."""
        for module in self._called:
            for parameter in module.parameters(recurse=False):
                self._let_go(parameter)
        self._called.clear()

    def fetch(self, module: nn.Module) -> None:
        """After a run: the module's own parameters, on the device."""
        for parameter in module.parameters(recurse=False):
            if parameter in self._gone:
                self._bring_back(parameter, self.device)
        module.to(self.device)

    def _calling(self, module: nn.Module, _: Any) -> None:
        self._called.add(module)
        for parameter in module.parameters(recurse=False):
            if parameter in self._gone:
                self._bring_back(parameter, self.device)

    def _let_go(self, parameter: nn.Parameter) -> None:
        self._gone.add(parameter)
        if parameter in self._names:  # none of its pages stays, and who reads it uncalled fails
            parameter.data = parameter.data.new_empty(0)
        else:
            parameter.data = self._before[parameter]

    def _bring_back(self, parameter: nn.Parameter, device: torch.device) -> None:
        self._gone.discard(parameter)
        data = parameter.data
        if parameter in self._names:
            assert self.shards is not None
            data = self.shards.read_outside(self._names[parameter]).to(parameter.dtype)
        parameter.data = data.to(device)


def _prefixes(name: str) -> Iterator[str]:
    """The names of all modules that hold the one of this name."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _move_buffers(modules: Iterable[nn.Module], device: torch.device | str) -> None:
    for module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
