"""Calibration as coroutines: one forward pass through the model, paused at every site.

Each calibration batch is one coroutine (a greenlet), and the coroutine is the model's own
forward. It pauses when it enters a block, and when a layer is about to read an input whose site
is not solved yet; there it hands that input over. When every batch has paused, the earliest site
among them is solved from the inputs handed over, its quantized weights are put in place, and
those batches go on. So every layer sees the inputs of the model quantized so far, one pass is
enough, and masks, rotary tables and layer patterns are right because the model itself makes them.

With ``propagate`` or ``tune`` every batch runs twice in lockstep: through the quantized weights,
and through the original ones. What the two read at a site differs by the error made so far.

The rejected option is what other packages do: call block 0 with a stub to capture its arguments,
then replay each block on them once per site. It costs several passes, and goes wrong where the
arguments differ from block to block (sliding windows, shared keys and values).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.error import apart
from optq.errors import ModelError
from optq.model.activations import Activations
from optq.model.batch import Batch, Passed
from optq.model.blocks import Block, Site
from optq.model.inputs import Handed, SiteSums, gather
from optq.model.layer import Layer
from optq.model.memory import trim
from optq.model.others import Others
from optq.model.sites import Sites
from optq.model.smoothing import Smoother
from optq.model.spread import Spread
from optq.model.weights import Weights
from optq.ranks import Ranks

ENOUGH = 4  # tokens to a column; an expert that saw fewer borrows from the rest of its block


@dataclass(eq=False)
class Flow:
    """One calibration run over ``batches`` (token ids ``[samples, tokens]`` each).

    With several ``ranks`` each takes its share of them through the model.

    ``solve(sites)`` quantizes the layers of each site, which comes with its sums, and puts their
    weights in place; the sites are of one shape, and sums are made as they are asked for. Experts
    that another rank solves come without sums: ``together(site)`` of them, in turn, are each one's.
    ``done(block, error)`` is called when no batch needs the block any more, before its weights go;
    ``error`` is how far the hidden states are then from full precision, where both streams run.
    ``restore(block)`` gives the quantized weights of its layers where they are known: then nothing
    is solved in it.
    ``activations`` keeps what the batches hold. ``tune(block, passages)`` is called with what each
    batch's two streams were given and made of it when all have passed a block, and says whether its
    weights are others now: those that the quantized stream goes on with.
    """

    model: Any
    blocks: list[Block]
    batches: list[Tensor]
    weights: Weights
    solve: Callable[[Iterator[tuple[Site, SiteSums | None]]], None]
    done: Callable[[Block, float | None], None] = lambda block, error: None
    propagate: bool = False
    activations: Activations | None = None
    restore: Callable[[Block], Iterator[tuple[Layer, Tensor]] | None] = lambda block: None
    ranks: Ranks = field(default_factory=Ranks)
    together: Callable[[Site], int] = lambda site: 1
    tune: Callable[[Block, list[tuple[Passed, Passed]]], bool] | None = None
    smoother: Smoother | None = None  # where activations are quantized
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "hessian": 0.0})

    def run(self) -> None:
        """Run to the end. On an error or Ctrl-C every paused batch is unwound before it leaves."""
        smoother = self.smoother
        source = () if smoother is None else (smoother.source,)
        self._sites = Sites(self.model, self.blocks, *source)
        watched = nullcontext() if smoother is None else smoother.hooks(self.blocks, self.model)
        self._held = self.activations or Activations(self.weights.device)
        self._held.shared = {id(buffer) for buffer in self.model.buffers()}
        self._finished: set[Block] = set()
        everyone = [Batch(self._forward, self.batches[0][:1], 0, "scout")]
        for kind in ["full", "quantized"] if self._twice else ["quantized"]:
            firsts = [0, *accumulate(map(len, self.batches))]
            own = self.ranks.own(len(self.batches))
            for ids, first in [*zip(self.batches, firsts, strict=False)][own]:
                everyone.append(Batch(self._forward, ids, first, kind))
        with torch.no_grad(), self.weights.outside.on_device(), self._sites.hooks(), watched:
            try:
                self._advance(everyone)
                self.weights.outside.let_go()
                while waiting := [batch.before for batch in everyone if batch.before]:
                    block = min(waiting, key=lambda block: block.index)
                    self._through(block, [batch for batch in everyone if batch.before is block])
            finally:
                for batch in everyone:
                    batch.unwind()

    @property
    def _twice(self) -> bool:
        """Whether the full-precision stream runs too."""
        return self.propagate or self.tune is not None

    def _forward(self, ids: Tensor) -> None:
        self.model(input_ids=ids.to(self.weights.device), use_cache=False)

    def _through(self, block: Block, waiting: list[Batch]) -> None:
        """Take all batches that wait before ``block`` to its other side."""
        if block in self._finished:
            raise ModelError(
                f"{block.name} is called again after other blocks",
                "models that loop over their blocks cannot be quantized",
            )
        self.weights.fetch(block)
        self._sites.begin(block)
        if self.smoother:
            self.smoother.begin()
        self._advance([batch for batch in waiting if batch.kind == "scout"])
        self._sites.arrange(block)
        if (known := self.restore(block)) is not None:
            for layer, weight in known:
                if self._twice:
                    self.weights.hold_originals([layer])
                layer.put(weight)
                layer.solved = True
            self._sites.begin(block)  # there are no sites: batches run straight through
        elif self.smoother:
            self.smoother.look(block, self._sites.order)
        tunes = self.tune is not None and known is None and not block.head
        batches = [batch for batch in waiting if batch.kind != "scout"]
        for batch in batches:
            batch.stays, batch.leaves = tunes, self._twice and not block.head
        self._advance(batches)
        while site := self._next(batches):
            here = [batch for batch in batches if batch.site is site]
            self.ranks.site = site.layers[0].name
            if self.ranks.total(sum(batch.kind == "quantized" for batch in here)):
                # Else there is nothing to go by.
                if self._twice:
                    self.weights.hold_originals(site.layers)
                if self.smoother:
                    self.smoother.smooth(site, here, self.weights.device)
                self._solve(site, here)
                for layer in site.layers:
                    layer.solved = True
            self._advance(here)
            if site.bank and site.layers[0].calls == 1 and len(here) == len(batches):
                site.let_go = self.weights.let_originals_go(site.layers, block)
        if tunes and self.tune:
            self._tune(self.tune, block, batches)
        self._finished.add(block)
        self.done(block, self._drifted(batches))
        self.weights.drop(block)

    def _tune(self, tune: Callable[..., bool], block: Block, batches: list[Batch]) -> None:
        """All batches have passed the block: it is tuned, and the quantized stream repeats it."""
        full = {batch.first_sample: batch for batch in batches if batch.kind == "full"}
        quantized = [batch for batch in batches if batch.kind == "quantized"]
        changed = tune(block, [(b.passed, full[b.first_sample].passed) for b in quantized])
        trim()
        self._held.read()
        for batch in quantized:
            batch.repeats = changed
        self._advance(batches)

    def _drifted(self, batches: list[Batch]) -> float | None:
        """The streams' squared difference behind a block, over the full-precision one's square."""
        left = {(batch.kind, batch.first_sample): batch.left for batch in batches}
        parts = []
        for batch in batches:
            batch.left = None
            own, full = (left.get((kind, batch.first_sample)) for kind in ("quantized", "full"))
            if batch.kind == "full" and own is not None and full is not None:
                parts.append(apart(own, full))
        every = [part for some in self.ranks.gather(parts, "errors") for part in some]
        energy = sum(part[1] for part in every)
        return sum(part[0] for part in every) / energy if energy else None

    def _next(self, batches: list[Batch]) -> Site | None:
        """The earliest site that any batch waits for, on this rank or another."""
        nowhere = len(self._sites.order)
        places = [batch.site.place for batch in batches if batch.site]
        place = self.ranks.least(min(places, default=nowhere))
        return None if place == nowhere else self._sites.order[place]

    def _advance(self, batches: list[Batch]) -> None:
        """Let each batch run to its next pause, the full-precision stream on original weights."""
        start = time.perf_counter()
        full = [batch for batch in batches if batch.kind == "full"]
        if full:
            with self.weights.originals():
                for batch in full:
                    self._step(batch)
        for batch in batches:
            if batch.kind != "full":
                self._step(batch)
        if self.weights.device.type == "cuda":
            torch.cuda.synchronize(self.weights.device)
        self.seconds["forward"] += time.perf_counter() - start

    def _solve(self, site: Site, here: list[Batch]) -> None:
        while True:
            try:
                self.solve(self._gather(site, here))
                return trim()
            except torch.OutOfMemoryError:
                # Of experts some have their new weights, and of several ranks the others would not
                # know; else nothing has happened yet.
                if site.bank or self.ranks.size > 1 or not self._held.halve():
                    raise

    def _step(self, batch: Batch) -> None:
        """Let one batch run to its next pause."""
        self._held.give(batch)
        batch.switch()
        while batch.short:  # of memory, in the midst of a block
            if not self._held.halve():
                raise batch.short
            self._held.give(batch)
            batch.switch()
        self._held.take(batch)

    def _gather(self, site: Site, here: list[Batch]) -> Iterator[tuple[Site, SiteSums | None]]:
        """What the site has seen; of experts, each one's in its turn."""
        quantized: list[Any] = [batch.input for batch in here if batch.kind == "quantized"]
        full: list[Any] = [batch.input for batch in here if batch.kind == "full"]
        if site.bank is None:
            yield site, self._sums(site, quantized, full, self.ranks)
            return
        others, every = Others(site, quantized, self.ranks), None
        if site.experts is site.bank.inner:
            every = self._sums(site, [batch.every for batch in quantized], [], self.ranks)
        one = Site(site.block, site.experts[0])
        spread = Spread(self.ranks, len(site.experts), self.together(one), quantized, full)
        enough = ENOUGH * site.layers[0].shape[1]
        for step in spread.steps():
            read, samples = spread.read(step), {}
            if every is None:  # all ranks have some of the tokens that stand in
                for expert in step:
                    if (lack := enough - spread.tokens[expert]) > 0:
                        samples[expert] = others.sample(expert, lack, spread.owner(expert))
            for expert in step:
                part = Site(site.block, site.experts[expert])
                if expert not in read:
                    yield part, None
                    continue
                sums = self._sums(part, *read[expert])
                if every is not None:
                    sums = sums.with_others(every, enough, every.tokens - sums.tokens)
                elif expert in samples:  # what it would make of tokens that went elsewhere
                    start = time.perf_counter()
                    inside = site.bank.activations(expert, samples[expert])
                    inside = inside[inside.isfinite().all(1)]  # of what the model never sends it
                    self.seconds["forward"] += elapsed(start, inside)
                    stand_in = self._sums(part, [Handed(0, self.batches[0], inside)], [])
                    sums = sums.with_others(stand_in, enough, stand_in.tokens)
                yield part, sums

    def _sums(
        self, site: Site, quantized: list[Any], full: list[Any], ranks: Ranks = Ranks()
    ) -> SiteSums:
        start = time.perf_counter()
        where = f"{site.layers[0].name} (block {site.block.index})"
        columns, device = site.layers[0].shape[1], self.weights.device
        dtype = torch.promote_types(site.layers[0].parameter.dtype, torch.float32)
        partners = full if self.propagate else None
        sums = gather(where, columns, device, dtype, quantized, partners, ranks)
        self.seconds["hessian"] += elapsed(start, sums.H)
        self._held.read()
        return sums
