"""What a run will hold at its peak, and how long it will take, from shapes alone.

Memory. Between two blocks every batch holds what goes into the next one (``Held.between``), inside
a block what its own forward keeps while it is paused (``Held.paused``), once for each stream.
Beside that there is at most one block:

* its weights, and while they are read those of its experts' first projection once more, which are
  stacked from one tensor to an expert;
* under error propagation the originals of the layers that have been solved, but for experts', which
  are let go with their site;
* the codes of what has been solved, a byte to a weight, and the scales;
* the site under way, ``rows x columns``: ``H``, its factor and the drift are ``columns x columns``,
  all else is a number of bytes to a weight, counted by adding up the tensors alive in a solver
  (``bench/plan.py`` holds the sum against runs). Experts are solved together while they fit into
  ``optq.solving.MEMORY``;
* when it is done, what is written of it, and ten bytes to a weight of the layer being packed.

What is left dense is checked for finite values one tensor at a time. All of it is above what the
process has when the run begins: the libraries, measured. Mapped files do not count: the system
drops their pages when others need the room.

Tuning the scales of all blocks at once has the whole model in memory, with its codes, and of a
portion of a batch what lies between blocks, one block's activations, and its logits five times.

What batches hold is bounded by ``--activation-memory``: the rest goes from a GPU to main memory,
and then to files.

Time. Multiply-adds, at the speed of a product of 1024 columns measured here, and passes over the
solver's tensors, at the speed of one such pass measured here. It is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optq.core.descent import ROWS_AT_ONCE
from optq.core.gptq import GPTQ
from optq.core.grid import BITS
from optq.core.hessian import TOKENS
from optq.core.obs import OBS
from optq.core.pruning import Pruner
from optq.core.rtn import RTN
from optq.core.solver import Solver
from optq.core.sparsegpt import SparseGPT
from optq.distill import Distill
from optq.machine import Speed
from optq.model.scout import Held
from optq.model.sensitivity import LENGTH, SAMPLES
from optq.model.shapes import BlockShape, SiteShape
from optq.model.student import CHUNK
from optq.model.student import TOKENS as AT_ONCE
from optq.quantize import BATCH_TOKENS
from optq.solving import LEAST, MEMORY, PORTION
from optq.tune import Tune
from optq.tuning import Tuning, held_back

NOTHING = Tune(None)  # is tuned
# Of what a solver lets go, the allocator keeps a part until its site is done.
SLACK = 1.5
WORKING = 150 * 10**6  # bytes that the libraries take when their products are first used
# Of what a block's forward has at a time without gradients, what it and its backward pass have with
# them: 0.9 (OPT) to 3.5 (experts) is kept, and as much again is made.
WITH_GRADIENTS = 5
TUNED = 25  # bytes to a weight of a block that is tuned: where it is, gradient, Adam's two, best
TUNED_PASSES = 12  # over those, of a step
MOVING = 24  # bytes to a scale that is tuned: its start, factor, gradient, best, and Adam's two
# What a run takes of the time that its products and passes would, each at the speed measured for
# one: 2.1 to 4.2 in ``bench/plan.py``.
SLOWER = 2.6
# Passes over a weight's float32 copies, by what makes them.
PASSES = {"rtn": 30, "sweep": 40, "polish": 25, "search": 30, "refit": 12}


@dataclass(frozen=True)
class Peak:
    """Bytes in main memory, on a device of its own, and in files for what batches hold."""

    host: int
    device: int
    files: int


@dataclass(frozen=True)
class Run:
    """All that memory and time depend on.

    ``held`` is of one sample; ``item`` bytes of a number of the model's; ``outside`` bytes of what
    is needed all the time, embeddings above all, of which ``cast`` are not as they are on disk;
    ``dense`` numbers of the largest tensor that stays as it is. ``limit`` bounds what batches hold
    on the device, ``host_limit`` beside a GPU in main memory. ``head`` are the rows and columns of
    the head, whose weight ``outside`` leaves out.
    """

    blocks: tuple[BlockShape, ...]
    held: Held
    samples: int
    seqlen: int
    streams: int
    item: int
    outside: int
    cast: int
    dense: int
    quantizer: Solver
    device: torch.device
    limit: int
    host_limit: int
    head: tuple[int, int]
    tune: Tune = NOTHING

    @property
    def propagates(self) -> bool:
        return self.streams > 1

    def peak(self) -> Peak:
        """Bytes in main memory, on the device and in files, above those at the start."""
        if self.tune.model is None:
            return self._of_blocks()
        blocks, (host, device) = self._of_blocks(), self._of_tuning(self.tune.model)
        return Peak(max(blocks.host, host), max(blocks.device, device), blocks.files)

    def _of_blocks(self) -> Peak:
        apart = self.device.type != "cpu"
        at_work = max(self._of_block(block) for block in self.blocks)
        # As a block comes, and as it goes to disk.
        there = max(block.bytes + block.stacked for block in self.blocks)
        goes = max(block.packed + 10 * block.largest for block in self.blocks)
        end = self.dense * (self.item + 3)
        _, host, files = self._kept(self.held.paused)
        always = WORKING + self.cast
        if apart:
            return Peak(always + host + max(there, goes, end), self.outside + at_work, files)
        coming = there + self._kept(self.held.between)[0]
        return Peak(always + max(at_work, coming, end), 0, host + files)

    def _of_tuning(self, distill: Distill) -> tuple[int, int]:
        """What :mod:`optq.distill` has in main memory and on a device of its own."""
        rows, columns = self.head
        weights = sum(site.weights for block in self.blocks for site in block.sites)
        groupsize = max(1, self.quantizer.scheme().groupsize)
        at_once = min(distill.batch, max(1, AT_ONCE // self.seqlen))
        running = WITH_GRADIENTS * at_once * self.held.running
        logits = 5 * at_once * self.seqlen * rows * self.item + 16 * CHUNK * rows
        at_work = sum(block.bytes for block in self.blocks) + weights
        at_work += MOVING * weights // groupsize + 16 * max(b.largest for b in self.blocks)
        at_work += at_once * self.held.between * len(self.blocks) + max(running, logits)
        host = WORKING + self.cast + self.samples * self.seqlen * columns * self.item
        if self.device.type == "cpu":
            return host + at_work, 0
        return host, self.outside + rows * columns * self.item + at_work

    def _kept(self, of_sample: int) -> tuple[int, int, int]:
        """What batches hold on the device, in host memory and in files: they are filled in turn."""
        rest, places = of_sample * (self.streams * self.samples + 1), []  # one goes ahead
        for limit in (self.limit, self.host_limit):
            places.append(min(rest, limit))
            rest -= places[-1]
        return places[0], places[1], rest

    def _running(self) -> int:
        """What the batch that runs makes and lets go."""
        batch = min(self.samples, max(1, BATCH_TOKENS // self.seqlen))
        return batch * (self.held.running - self.held.paused)

    def _of_block(self, block: BlockShape) -> int:
        most, solved, originals = self._running(), 0, 0
        for site in block.sites:
            own = site.weights * self.item if self.propagates else 0
            originals += own
            most = max(most, originals + solved + self._of_site(site))
            if site.count > 1:
                originals -= own
            solved += site.weights + site.weights // 16  # codes, and scales of some groups
        most = max(most, originals + solved + block.packed + 10 * block.largest)
        if self.tune.blocks is not None:
            batch = self.tune.blocks.batch(self.samples, self.seqlen)
            moving = TUNED * sum(site.weights for site in block.sites)
            moving += WITH_GRADIENTS * batch * self.held.running
            metrics = 4 * len(self.blocks) * self.head[1] ** 2
            most = max(most, originals + 2 * solved + moving) + metrics
        return block.bytes + most + self._kept(self.held.paused)[0]

    def _of_site(self, site: SiteShape) -> int:
        portion = max(LEAST, PORTION // (40 * site.columns))
        weights, square = min(site.rows, portion) * site.columns, site.columns**2
        together = max(1, MEMORY // (4 * site.columns * (4 * site.columns + 10 * site.rows)))
        together = min(together, site.count)
        held = self.item + 4 * self.propagates
        if isinstance(self.quantizer, RTN):
            each, once = held, 30 if self.propagates else 13
            squares = 4 + 4 * self.propagates
        else:
            # Rounded, swept, and the codes; then what polishing or measuring takes.
            each, once = held + 14, 12 if self.propagates else 3
            squares = 8 + 4 * self.propagates
            if isinstance(self.quantizer, GPTQ) and self.quantizer.polish:
                rows = site.rows if self.device.type == "cuda" else ROWS_AT_ONCE
                once = max(once, 22 * min(1, rows / site.rows))  # type: ignore[assignment]
            elif isinstance(self.quantizer, Pruner):
                once += 28  # two copies more, and what least squares take
        tokens = min(TOKENS, self.samples * self.seqlen)
        gather = 4 * tokens * site.columns + 4 * square
        solve = int(weights * once) + 2 * square
        return together * (weights * each + squares * square) + max(gather, int(SLACK * solve))

    def seconds(self, speed: Speed, written: int) -> float:
        """An estimate: products, passes over weights, and ``written`` bytes; no text is read."""
        tokens, streams = self.samples * self.seqlen, self.streams
        exact = quick = weights = 0.0
        rounds = self.quantizer.polish if isinstance(self.quantizer, GPTQ) else 0
        solved = not isinstance(self.quantizer, RTN)
        steps = self.quantizer.refit if isinstance(self.quantizer, SparseGPT) else 0
        for block in self.blocks:
            for site in block.sites:
                share = min(1, self.held.experts / site.count) if site.count > 1 else 1
                seen, square = tokens * share * site.count, site.columns**2
                quick += streams * site.weights / site.count * seen + square * seen / 2
                quick += (streams - 1) * square * seen  # the drift
                exact += solved * site.count * site.columns**3 / 6
                exact += (
                    (streams - 1)
                    * site.count
                    * square
                    * (min(site.rows, site.columns) + site.rows * (site.rows > site.columns))
                )
                product = site.weights * site.columns
                exact += product * ((1 if solved else 0.5) + steps)
                quick += product * (1 + (rounds + 1) * (rounds > 0))
                weights += site.weights
                if isinstance(self.quantizer, OBS):  # an inverse to a row, and a step to a weight
                    exact += self.quantizer.pattern.share * product * site.columns
        passes = PASSES["rtn"] if not solved else PASSES["sweep"] + PASSES["polish"] * rounds
        passes += PASSES["search"] * self.quantizer.mse + PASSES["refit"] * steps
        quick += 0 if self.tune.model is None else self._products(self.tune.model, weights)
        if self.tune.blocks is not None:
            quick += self._once() * self._seen(self.tune.blocks)
            passes += TUNED_PASSES * self.tune.blocks.steps_at(self.quantizer.wbits)
        moved = 4 * weights * passes + (written + sum(block.bytes for block in self.blocks)) * 4
        return SLOWER * (exact / speed.exact + quick / speed.quick + moved / speed.bytes)

    def _products(self, distill: Distill, weights: float) -> float:
        """Multiply-adds of tuning: a forward pass again and twice as much back, of each step."""
        rows, columns = self.head
        tokens, back = self.samples * self.seqlen, held_back(self.samples)
        seen = distill.steps * distill.batch * self.seqlen
        looked = (1 + distill.steps // distill.every) * back * self.seqlen
        once = self._once()
        # The head reads both models' states; weights are made, and gradients reduced, by passes.
        products = tokens * (once + rows * columns)
        products += looked * (once + 2 * rows * columns) + seen * (4 * once + 3 * rows * columns)
        return products + distill.steps * 256 * weights

    def probing(self, speed: Speed) -> float:
        """Of the pass before a run within a budget: one stream, and a sweep for each width."""
        probe = replace(self, streams=1, tune=NOTHING)
        more = replace(probe, samples=0).seconds(speed, 0)
        return probe.seconds(speed, 0) + (len(BITS) - 1) * more

    def _once(self) -> float:
        """Multiply-adds of a token through all blocks."""
        return sum(
            site.weights * (min(1, self.held.experts / site.count) if site.count > 1 else 1)
            for block in self.blocks
            for site in block.sites
        )

    def _seen(self, tuning: Tuning) -> float:
        """Tokens through a block to tune it, there and back; once more at the end; for the metric,
        three times.
        """
        batch, steps = (
            tuning.batch(self.samples, self.seqlen),
            tuning.steps_at(self.quantizer.wbits),
        )
        looked = (1 + tuning.looks) * held_back(self.samples)
        metric = 3 * min(self.samples, SAMPLES) * min(self.seqlen, LENGTH)
        return self.seqlen * (3 * steps * batch + looked + self.samples) + metric
