"""A quantization under way: every site is solved, and every block handed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.error import output_energy
from optq.core.grid import Storage
from optq.core.problem import Problem
from optq.core.qep import QEP
from optq.core.solution import Solution
from optq.core.solver import Solver
from optq.core.weight import LayerScheme, QuantizedWeight
from optq.errors import ModelError, NumericsError
from optq.formats.fit import check_layers
from optq.formats.scheme import Format, Solved
from optq.model.activations import Activations
from optq.model.blocks import Block, Site
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.inputs import SiteSums
from optq.model.layer import Layer
from optq.model.names import disk_names
from optq.model.shards import Shards
from optq.model.weights import Weights
from optq.record import LayerRecord

BATCH_TOKENS = 4096  # of one coroutine: enough to keep matrix products busy
MEMORY = 2**29  # bytes for experts that are solved together: more of them are hardly faster


@dataclass(frozen=True)
class Progress:
    """One site is solved, or one expert's part of it."""

    block: int
    blocks: int
    site: str  # its first layer
    layers: list[LayerRecord]


class Sink(Protocol):
    """What takes the layers of each block as soon as all are solved.

    Those of the first blocks that an earlier run has ``finished`` it gives back, block by block.
    """

    layers: dict[str, LayerScheme]  # all until now

    def commit(self, layers: Solved, records: Sequence[LayerRecord]) -> None: ...
    def finished(self) -> int: ...
    def restored(self) -> Iterator[tuple[str, QuantizedWeight]] | None: ...


class Quantization:
    """One model, one quantizer: each site is solved, and each block handed to ``sink``.

    ``names`` are those of :func:`names_on_disk`. With ``keep`` the weights of finished blocks stay.
    ``shards`` have those that are not in the model yet.
    """

    def __init__(
        self,
        model: Any,
        blocks: list[Block],
        names: dict[str, str],
        quantizer: Solver,
        qep: QEP | None,
        storage: Storage,
        sink: Sink,
        keep: bool,
        progress: Callable[[Progress], None],
        shards: Shards | None = None,
    ) -> None:
        self.model, self.blocks, self.names, self.keep = model, blocks, names, keep
        self.quantizer, self.qep, self.storage = quantizer, qep, storage
        self.sink, self.progress, self.shards = sink, progress, shards
        self.scheme = quantizer.scheme()
        self.solved: dict[str, tuple[QuantizedWeight, LayerScheme]] = {}  # of the current block
        self.records: list[LayerRecord] = []
        self.restoring = False  # the current block is finished already
        every = [layer for block in blocks for layer in block.layers]
        self.layers = {names[f"{x.name}.weight"].removesuffix(".weight"): x for x in every}
        self.seconds = dict.fromkeys(("forward", "hessian", "factor", "solve", "write"), 0.0)

    def calibrate(self, tokens: Tensor, activations: Activations) -> None:
        """Take all calibration tokens ``[samples, tokens]`` through the model once.

        ``activations`` keeps what they hold, and says on which device.
        """
        if self._nothing_left():
            return
        batches = list(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])))
        # What is on its way to disk leaves the memory, block by block.
        weights = Weights(self.model, self.blocks, activations.device, self.keep, self.shards)
        then = self.solve, self.done, self.qep is not None, activations, self.restore
        flow = Flow(self.model, self.blocks, batches, weights, *then)
        flow.run()
        weights.complete()
        self.seconds |= flow.seconds

    def solve(self, sites: Iterator[tuple[Site, SiteSums]]) -> None:
        """Quantize the stacked rows of each site and put the weights back, some sites at a time."""
        some: list[tuple[Site, SiteSums]] = []
        for site, sums in sites:
            some.append((site, sums))
            rows, columns = sum(layer.shape[0] for layer in site.layers), len(sums.H)
            # H, its factor and what makes them; weights, aims, codes and what the sweep holds.
            bytes_each = 4 * columns * (4 * columns + 10 * rows)
            if (len(some) + 1) * bytes_each > MEMORY:
                self._solve_together(some)
                some.clear()
        if some:
            self._solve_together(some)

    def _solve_together(self, some: list[tuple[Site, SiteSums]]) -> None:
        weights, problems, aims = [], [], []
        for site, sums in some:
            for layer in site.layers:
                if not torch.isfinite(layer.weight).all():
                    raise NumericsError(
                        f"the weight of {layer.name} (block {site.block.index}) holds NaN or"
                        " infinity",
                        "copy the model again, or train it again",
                    )
            weights.append(weight := torch.cat([layer.weight for layer in site.layers]))
            problems.append(problem := self.quantizer.problem(sums.H))
            start = time.perf_counter()
            aims.append(None if self.qep is None else _aim(self.qep, problem, site, sums, weight))
            problem.seconds["solve"] += elapsed(start, weight) - problem.seconds["factor"]
        solutions = self.quantizer.solve_together(problems, weights, aims, self.storage)
        for (site, sums), weight, problem, solution in zip(
            some, weights, problems, solutions, strict=True
        ):
            self._put(site, sums, weight, problem, solution)

    def _put(
        self, site: Site, sums: SiteSums, weight: Tensor, problem: Problem, solution: Solution
    ) -> None:
        """Solved: into the model, and among what goes to disk with the block."""
        rows = [layer.shape[0] for layer in site.layers]
        energies = output_energy(weight, sums.H).split(rows)
        records = []
        for layer, part, energy in zip(site.layers, solution.split(rows), energies, strict=True):
            layer.put(part.weight)
            name = self.names[f"{layer.name}.weight"].removesuffix(".weight")
            self.solved[name] = part, self.scheme
            record = _record(layer, part, energy.sum().item(), problem, len(weight))
            seen = {"tokens": sums.tokens, "borrowed": sums.borrowed}
            records.append(record.model_copy(update=seen))
        self.records += records
        for stage, seconds in problem.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.progress(Progress(site.block.index, len(self.blocks), site.layers[0].name, records))

    def _nothing_left(self) -> bool:
        """Whether an earlier run has finished all blocks: nobody then needs what runs through them.

        But for how often a layer is called, where a module is part of several blocks.
        """
        modules = [module for block in self.blocks for module in block.module.modules()]
        if self.sink.finished() < len(self.blocks) or len({*modules}) < len(modules):
            return False
        for name in self.sink.layers:
            self.layers[name].solved = True
        return True

    def restore(self, block: Block) -> Iterator[tuple[Layer, Tensor]] | None:
        """The weights that an earlier run has put into a block, read back from its file."""
        found = self.sink.restored()
        self.restoring = found is not None
        if found is None:
            return None
        return ((self.layers[name], weight.weight) for name, weight in found)

    def done(self, block: Block) -> None:
        """A block that no batch needs any more is handed on."""
        if self.restoring:
            return
        start = time.perf_counter()
        calls = {layer.name: layer.calls for layer in block.layers}
        self.records = [
            record.model_copy(update={"calls": calls.get(record.name, record.calls)})
            for record in self.records
        ]
        self.sink.commit(self.solved, self.records)
        self.solved, self.records = {}, []
        self.seconds["write"] += time.perf_counter() - start


def names_on_disk(
    model: Any, blocks: list[Block], checkpoint: Checkpoint, quantizer: Solver, form: Format
) -> dict[str, str]:
    """The names on disk of the model's tensors. Refuses a layer that cannot be written."""
    names = disk_names(model, checkpoint.files)
    check_layers(form, blocks, quantizer.scheme())
    for layer in (layer for block in blocks for layer in block.layers):
        if f"{layer.name}.weight" not in names:
            raise ModelError(
                f"{layer.name} is not on disk as one tensor", "leave it dense with --skip"
            )
    return names


def _aim(qep: QEP, problem: Problem, site: Site, sums: SiteSums, weight: Tensor) -> Tensor | None:
    """What the stacked rows of a site aim at; None: at themselves, as where nothing drifted."""
    drift = sums.drift
    assert drift is not None  # the full-precision stream runs
    if not any(qep.applies(layer.name) for layer in site.layers) or not drift.any():
        return None
    weight = weight.to(drift.dtype)
    target = qep.correct(problem, weight, drift)
    rows = [layer.shape[0] for layer in site.layers]
    for layer, kept, moved in zip(site.layers, weight.split(rows), target.split(rows), strict=True):
        if not qep.applies(layer.name):
            moved.copy_(kept)
    return target


def _record(
    layer: Layer, part: Solution, energy: float, problem: Problem, site_rows: int
) -> LayerRecord:
    rows, cols = layer.shape
    error = part.error.sum().item()
    return LayerRecord(
        name=layer.name,
        rows=rows,
        cols=cols,
        error=error,
        relative_error=error / energy if energy else 0.0,
        rtn_error=part.rtn_error.sum().item(),
        damp=problem.damp,
        seconds=sum(problem.seconds.values()) * rows / site_rows,
        damp_tries=problem.damp_tries,
        dead_columns=int(problem.dead.sum()),
        fallback_rows=int(part.fell_back.sum()),
        calls=layer.calls,
    )
