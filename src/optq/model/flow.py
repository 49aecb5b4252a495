"""Calibration as coroutines: one forward pass through the model, paused at every site.

Each calibration batch is one coroutine (a greenlet), and the coroutine is the model's own
forward. It pauses when it enters a block, and when a layer is about to read an input whose site
is not solved yet; there it hands that input over. When every batch has paused, the earliest site
among them is solved from the inputs handed over, its quantized weights are put in place, and
those batches go on. So every layer sees the inputs of the model quantized so far, one pass is
enough, and masks, rotary tables and layer patterns are right because the model itself makes them.

Which layers share a site is found out, not declared: a scout, one more coroutine with one sample,
goes through each block just before the batches and records which layers read the same tensor: the
same object at the same version, held alive meanwhile; never equal contents and never an address.

With ``propagate`` every batch runs twice in lockstep: through the quantized weights, and through
the original ones. What the two streams read at a site differs by the error made so far.

The rejected option is what other packages do: call block 0 with a stub to capture its arguments,
then replay each block on them once per site. It costs several passes, and goes wrong where the
arguments differ from block to block (sliding windows, shared keys and values).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from optq.core.clock import elapsed
from optq.errors import ModelError
from optq.model.blocks import Block, Layer
from optq.model.inputs import Handed, Inputs, gather
from optq.model.modes import default_modes


@dataclass(eq=False)
class Site:
    """One distinct input inside a block, with the layers that read it."""

    block: Block
    layers: list[Layer]
    order: float  # of the first call in the block


@dataclass
class Seconds:
    """Where the time of a run went."""

    forward: float = 0.0
    hessian: float = 0.0


class _Batch(greenlet):
    """One forward pass of the model on some token ids, paused wherever it has to wait."""

    def __init__(self, flow: Flow, ids: Tensor, first_sample: int, kind: str) -> None:
        super().__init__(self._forward)
        self.flow, self.ids, self.first_sample, self.kind = flow, ids, first_sample, kind
        # Where it is paused: before a block, or before a site whose input it hands over.
        self.before: Block | None = None
        self.site: Site | None = None
        self.x = ids
        self.handed: dict[Site, weakref.ref[Tensor]] = {}
        self.called: set[Layer] = set()

    def _forward(self) -> None:
        # Nothing after the blocks is needed: the head's pre-hook ends the coroutine.
        self.flow.model(input_ids=self.ids.to(self.flow.device), use_cache=False)

    def pause(self) -> None:
        """Sleep, inside the coroutine. torch's modes belong to the thread, not to us."""
        with default_modes():
            self.parent.switch()
        self.before = self.site = None
        self.x = self.ids  # the input that was handed over may go


@dataclass(eq=False)
class Flow:
    """One calibration run over ``batches`` (token ids ``[samples, tokens]`` each).

    ``solve(site, inputs)`` quantizes the site's layers and puts their weights in place;
    ``done(block)`` is called when no batch needs the block any more.
    """

    model: Any
    blocks: list[Block]
    batches: list[Tensor]
    device: torch.device
    solve: Callable[[Site, Inputs], None]
    done: Callable[[Block], None] = lambda block: None
    propagate: bool = False
    seconds: Seconds = field(default_factory=Seconds)
    passes: list[int] = field(default_factory=list)  # forward passes of the batches, by block

    def run(self) -> None:
        """Run to the end. On an error or Ctrl-C every paused batch is unwound before it leaves."""
        self._site_of: dict[Layer, Site] = {}
        self._seen: list[tuple[Tensor, int, Site]] = []  # the scout's inputs, held alive
        self._finished: set[Block] = set()
        self._versions = {
            layer: layer.parameter._version for block in self.blocks for layer in block.layers
        }
        self.passes = [0] * len(self.blocks)
        scout = _Batch(self, self.batches[0][:1], 0, "scout")
        starts = [0]
        for ids in self.batches:
            starts.append(starts[-1] + len(ids))
        kinds = ["full", "quantized"] if self.propagate else ["quantized"]
        self._batches = {
            kind: [_Batch(self, ids, s, kind) for ids, s in zip(self.batches, starts, strict=False)]
            for kind in kinds
        }
        everyone = [scout, *(batch for kind in kinds for batch in self._batches[kind])]
        with torch.no_grad(), self._outside_blocks_on_device(), self._hooks():
            try:
                self._advance(everyone)
                while waiting := [batch.before for batch in everyone if batch.before]:
                    block = min(waiting, key=lambda block: block.index)
                    self._through(block, [batch for batch in everyone if batch.before is block])
            finally:
                for batch in everyone:
                    if batch and not batch.dead:
                        batch.throw(GreenletExit)

    @contextmanager
    def _outside_blocks_on_device(self) -> Iterator[None]:
        """Embeddings, norms and tables, which are needed all the time; but not the head."""
        skip = {id(m) for block in self.blocks for m in block.module.modules()}
        skip.add(id(self.model.get_output_embeddings()))
        before: list[tuple[nn.Parameter, Tensor]] = []
        for module in self.model.modules():
            if id(module) in skip:
                continue
            for parameter in module.parameters(recurse=False):
                before.append((parameter, parameter.data))
                parameter.data = parameter.data.to(self.device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        try:
            yield
        finally:
            for parameter, data in before:
                parameter.data = data
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to("cpu"))

    def _through(self, block: Block, waiting: list[_Batch]) -> None:
        """Take all batches that wait before ``block`` to its other side."""
        if block in self._finished:
            raise ModelError(
                f"{block.name} is called again after other blocks",
                "models that loop over their blocks cannot be quantized",
            )
        for layer in block.layers:
            if layer.parameter._version != self._versions[layer]:
                raise ModelError(
                    f"the model changes {layer.name} while it runs",
                    "models that rescale their own weights cannot be quantized",
                )
            # Memory of its own: what is written to a mapped file's pages stays until the whole
            # file is let go, and the quantized weights of a model larger than memory with it.
            if self.device.type == "cpu":
                layer.parameter.data = layer.parameter.data.clone()
        block.module.to(self.device)
        self._advance([batch for batch in waiting if batch.kind == "scout"])
        self._seen.clear()
        batches = [batch for batch in waiting if batch.kind != "scout"]
        self.passes[block.index] += len(batches)
        self._advance(batches)
        while sites := [batch.site for batch in batches if batch.site]:
            site = min(sites, key=lambda site: site.order)
            here = [batch for batch in batches if batch.site is site]
            if all(batch.kind == "full" for batch in here):  # nothing of the quantized model's
                self._advance(here)
                continue
            inputs = self._gather(site, here)
            if self.propagate:
                for layer in site.layers:
                    layer.original = layer.parameter.data.clone()
            self.solve(site, inputs)
            for layer in site.layers:
                layer.solved = True
            self._advance(here)
        for layer in block.layers:
            if not layer.shared:
                layer.original = None
        self._finished.add(block)
        self.done(block)

    def _advance(self, batches: list[_Batch]) -> None:
        """Let each batch run to its next pause, the full-precision stream on original weights."""
        start = time.perf_counter()
        full = [batch for batch in batches if batch.kind == "full"]
        if full:
            self._swap_originals()
            try:
                for batch in full:
                    batch.switch()
            finally:
                self._swap_originals()
        for batch in batches:
            if batch.kind != "full":
                batch.switch()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.forward += time.perf_counter() - start

    def _gather(self, site: Site, here: list[_Batch]) -> Inputs:
        start = time.perf_counter()
        handed = {
            kind: [Handed(b.first_sample, b.ids, b.x) for b in here if b.kind == kind]
            for kind in ("quantized", "full")
        }
        where = f"{site.layers[0].name} (block {site.block.index})"
        full = handed["full"] if self.propagate else None
        inputs = gather(where, site.layers[0].shape[1], self.device, handed["quantized"], full)
        self.seconds.hessian += elapsed(start, inputs.H)
        return inputs

    def _swap_originals(self) -> None:
        for layer in self._site_of:
            if layer.original is not None:
                data = layer.parameter.data
                layer.parameter.data = layer.original
                layer.original = data

    # What runs inside a coroutine: hooks.

    @contextmanager
    def _hooks(self) -> Iterator[None]:
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

    def _entering(self, batch: _Batch, block: Block, args: tuple, kwargs: dict) -> None:
        from transformers import Cache

        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ModelError(
                f"{block.name} is given a key-value cache although none was asked for",
                "report this model: its calibration would not be repeatable",
            )
        batch.before = block
        batch.pause()

    def _reading(self, batch: _Batch, layer: Layer, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if batch.kind == "scout":
            self._record(layer, x)
            return
        site = self._site_of.get(layer)
        if site is None:  # the scout did not come by here: it follows where this batch was last
            site = self._new_site(layer)
            here = [past.order for past in batch.handed if past.block is site.block]
            site.order = max(here, default=-1) + 0.5
        if layer in batch.called:
            return  # a layer belongs to its first call
        batch.called.add(layer)
        if site not in batch.handed and not layer.solved:
            batch.handed[site] = weakref.ref(x)
            batch.site, batch.x = site, x
            batch.pause()
        elif site in batch.handed and batch.handed[site]() is not x:
            raise ModelError(
                f"{layer.name} reads another tensor than {site.layers[0].name} for some samples",
                "report this model: its sites depend on the text",
            )

    def _leaving(self, batch: _Batch, _: None, args: tuple, kwargs: dict) -> None:
        raise GreenletExit

    def _record(self, layer: Layer, x: Tensor) -> None:
        layer.calls += 1
        if layer in self._site_of:
            return
        for tensor, version, site in self._seen:
            if tensor is x and version == x._version:
                site.layers.append(layer)
                self._site_of[layer] = site
                return
        self._seen.append((x, x._version, self._new_site(layer)))

    def _new_site(self, layer: Layer) -> Site:
        block = next(block for block in self.blocks if layer in block.layers)
        self._site_of[layer] = site = Site(block, [layer], order=len(self._site_of))
        return site


def _pre_hook(module: nn.Module, act: Callable[..., None], what: Any) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        batch = getcurrent()
        if isinstance(batch, _Batch):
            act(batch, what, args, kwargs)
        # Returns None: a value would replace the module's arguments.

    return module.register_forward_pre_hook(hook, with_kwargs=True)
