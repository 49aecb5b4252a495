"""A quantization under way: every site that the flow brings is solved, stored and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optq import __version__
from optq.core.error import output_energy
from optq.core.grid import Storage
from optq.core.problem import Problem
from optq.core.qep import QEP
from optq.core.solution import Solution
from optq.core.solver import Solver
from optq.errors import ModelError, NumericsError
from optq.formats.fit import check_layers
from optq.formats.scheme import Format
from optq.formats.writer import Writer
from optq.model.blocks import Block, Layer, Site, linears_outside
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.inputs import SiteSums
from optq.model.source import disk_names
from optq.model.weights import Weights

BATCH_TOKENS = 4096  # of one coroutine: enough to keep matrix products busy


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer.

    ``error`` is ``tr((W - Q) H (W - Q)^T)``: the mean squared output error per token, summed over
    rows; ``relative_error`` divides it by ``tr(W H W^T)``, ``rtn_error`` is round-to-nearest's.
    """

    name: str
    rows: int
    cols: int
    error: float
    relative_error: float
    rtn_error: float
    damp: float
    seconds: float
    damp_tries: int = 0
    dead_columns: int = 0
    fallback_rows: int = 0
    calls: int = 1  # of the layer in one forward; it is calibrated on the first


@dataclass(frozen=True)
class Progress:
    """One site is solved."""

    block: int
    blocks: int
    site: str  # its first layer
    layers: list[LayerRecord]


class Quantization:
    """One model, one quantizer. Solved layers go to ``writer``; without one they are kept."""

    def __init__(
        self,
        model: Any,
        blocks: list[Block],
        checkpoint: Checkpoint,
        quantizer: Solver,
        qep: QEP | None,
        form: Format,
        progress: Callable[[Progress], None],
    ) -> None:
        self.model, self.blocks, self.checkpoint = model, blocks, checkpoint
        self.quantizer, self.qep, self.form, self.progress = quantizer, qep, form, progress
        self.storage: Storage = form.storage(model.dtype)
        self.scheme = quantizer.scheme()
        self.names = disk_names(model, checkpoint.files)
        check_layers(form, blocks, self.scheme)
        for layer in (layer for block in blocks for layer in block.layers):
            if f"{layer.name}.weight" not in self.names:
                raise ModelError(
                    f"{layer.name} is not on disk as one tensor", "leave it dense with --skip"
                )
        self.writer: Writer | None = None
        self.kept: dict[str, dict[str, Tensor]] = {}  # encoded layers, by their name on disk
        self.records: list[LayerRecord] = []
        self.bytes = self.weights = 0
        self.seconds = dict.fromkeys(("forward", "hessian", "factor", "solve", "write"), 0.0)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers as stored, scales and all."""
        return 8 * self.bytes / max(self.weights, 1)

    def calibrate(self, tokens: Tensor, device: torch.device) -> None:
        """Take all calibration tokens ``[samples, tokens]`` through the model once."""
        batches = list(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])))
        # What is on its way to disk leaves the memory, block by block.
        weights = Weights(self.model, self.blocks, device, keep=self.writer is None)
        propagate = self.qep is not None
        flow = Flow(self.model, self.blocks, batches, weights, self.solve, propagate=propagate)
        flow.run()
        # A module that later blocks share is called again after its record was made.
        calls = {layer.name: layer.calls for block in self.blocks for layer in block.layers}
        self.records = [replace(each, calls=calls[each.name]) for each in self.records]
        self.seconds |= flow.seconds

    def solve(self, site: Site, inputs: SiteSums) -> None:
        """Quantize the stacked rows of one site and put the weights back."""
        for layer in site.layers:
            if not torch.isfinite(layer.weight).all():
                raise NumericsError(
                    f"the weight of {layer.name} (block {site.block.index}) holds NaN or infinity",
                    "copy the model again, or train it again",
                )
        rows = [layer.shape[0] for layer in site.layers]
        weight = torch.cat([layer.weight for layer in site.layers])
        problem = self.quantizer.problem(inputs.H)
        aim = None if self.qep is None else _aim(self.qep, problem, site, inputs.drift, weight)
        solution = self.quantizer.solve(problem, weight, aim, self.storage)
        energies = output_energy(weight, inputs.H).split(rows)
        records = []
        for layer, part, energy in zip(site.layers, solution.split(rows), energies, strict=True):
            layer.put(part.weight)
            self._keep(layer, part)
            records.append(_record(layer, part, energy.sum().item(), problem, len(weight)))
        self.records += records
        for stage, seconds in problem.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.progress(Progress(site.block.index, len(self.blocks), site.layers[0].name, records))

    def finish(self, writer: Writer, calibration: dict[str, Any]) -> None:
        """Complete a checkpoint, with all layers that :meth:`save` or the run gave it."""
        start = time.perf_counter()
        dense, outside = (
            [self.names.get(f"{name}.weight", name).removesuffix(".weight") for name in names]
            for names in (self.dense(), linears_outside(self.model, self.blocks))
        )
        record = self.record(calibration)
        percdamp = self.quantizer.percdamp
        writer.finish(dense, percdamp, record, outside)
        self.seconds["write"] += time.perf_counter() - start

    def save(self, writer: Writer, calibration: dict[str, Any]) -> None:
        """Write what a run without a writer has kept."""
        for name, tensors in self.kept.items():
            writer.add(name, tensors, self.scheme)
        self.finish(writer, calibration)

    def dense(self) -> list[str]:
        """The linear layers inside the blocks that stay as they were."""
        solved = {record.name for record in self.records}
        return [name for block in self.blocks for name in block.linears if name not in solved]

    def record(self, calibration: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint says of its making. No times, no paths: same seed, same bytes."""
        return {
            "optq": __version__,
            "method": type(self.quantizer).__name__.lower(),
            "quantizer": asdict(self.quantizer),  # type: ignore[call-overload]
            "qep": None if self.qep is None else asdict(self.qep),
            "calibration": calibration,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
            "dense": self.dense(),
            "layers": [
                {key: value for key, value in asdict(record).items() if "seconds" not in key}
                for record in self.records
            ],
        }

    def _keep(self, layer: Layer, part: Solution) -> None:
        start = time.perf_counter()
        name = self.names[f"{layer.name}.weight"].removesuffix(".weight")
        tensors = self.form.encode(part, self.model.dtype, self.scheme.sym)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        self.weights += part.codes.numel()
        if self.writer is None:
            self.kept[name] = tensors
        else:
            self.writer.add(name, tensors, self.scheme)
        self.seconds["write"] += time.perf_counter() - start


def _aim(
    qep: QEP, problem: Problem, site: Site, drift: Tensor | None, weight: Tensor
) -> Tensor | None:
    """What the stacked rows of a site aim at; None: at themselves, as where nothing drifted."""
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
