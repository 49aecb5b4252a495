"""A quantization under way: every site that the flow brings is solved, stored and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optq import __version__
from optq.core.error import output_energy
from optq.core.gptq import GPTQ
from optq.core.grid import Storage
from optq.core.hessian import Factor
from optq.core.obq import OBQ
from optq.core.qep import QEP
from optq.core.rtn import RTN
from optq.core.solution import Solution
from optq.errors import ModelError, NumericsError
from optq.formats.fit import check_layers
from optq.formats.scheme import Format, LayerScheme
from optq.formats.writer import Writer
from optq.model.blocks import Block, Layer, linears_outside, release
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow, Inputs, Site
from optq.model.source import disk_names

Quantizer = RTN | GPTQ | OBQ
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
    polish_gain: float = 0.0  # the part of the site's error that polish took
    polish_seconds: float = 0.0
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
        quantizer: Quantizer,
        qep: QEP | None,
        form: Format,
        progress: Callable[[Progress], None],
    ) -> None:
        self.model, self.blocks, self.checkpoint = model, blocks, checkpoint
        self.quantizer, self.qep, self.form, self.progress = quantizer, qep, form, progress
        self.storage: Storage = form.storage(model.dtype)
        self.scheme = layer_scheme(quantizer)
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
        propagate = self.qep is not None
        flow = Flow(self.model, self.blocks, batches, device, self.solve, self.done, propagate)
        flow.run()
        self.seconds |= {"forward": flow.seconds.forward, "hessian": flow.seconds.hessian}

    def solve(self, site: Site, inputs: Inputs) -> None:
        """Quantize the stacked rows of one site and put the weights back."""
        for layer in site.layers:
            if not torch.isfinite(layer.weight).all():
                raise NumericsError(
                    f"the weight of {layer.name} (block {site.block.index}) holds NaN or infinity",
                    "copy the model again, or train it again",
                )
        rows = [layer.shape[0] for layer in site.layers]
        weight = torch.cat([layer.weight for layer in site.layers])
        aim, qep = None, self.qep
        drifted = inputs.drift is not None and bool(inputs.drift.any())  # not at the first site
        if qep is not None and drifted and any(qep.applies(each.name) for each in site.layers):
            weight = weight.to(inputs.H.dtype)
            aim = partial(_target, qep, site, inputs, weight)
        solution = self.quantizer.solve(weight, inputs.H, self.storage, aim)
        energies = output_energy(weight, inputs.H).split(rows)
        records = []
        for layer, part, energy in zip(site.layers, solution.split(rows), energies, strict=True):
            layer.put(part.weight)
            self._keep(layer, part)
            records.append(_record(layer, part, energy.sum().item(), len(weight)))
        self.records += records
        for stage, seconds in solution.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.progress(Progress(site.block.index, len(self.blocks), site.layers[0].name, records))

    def done(self, block: Block) -> None:
        """A block that no batch needs any more: what is on its way to disk leaves the memory."""
        if self.writer is not None:
            release(block, self.blocks)
        else:
            block.module.to("cpu")

    def finish(self, writer: Writer, calibration: dict[str, Any]) -> None:
        """Complete a checkpoint, with all layers that :meth:`save` or the run gave it."""
        start = time.perf_counter()
        dense, outside = (
            [self.names.get(f"{name}.weight", name).removesuffix(".weight") for name in names]
            for names in (self.dense(), linears_outside(self.model, self.blocks))
        )
        record = self.record(calibration)
        percdamp = getattr(self.quantizer, "percdamp", 0.0)
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
            "quantizer": asdict(self.quantizer),
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


def layer_scheme(quantizer: Quantizer) -> LayerScheme:
    """What the config of a checkpoint says of each layer that this quantizer solves."""
    static = getattr(quantizer, "static_groups", False) or quantizer.groupsize == -1
    actorder = getattr(quantizer, "actorder", False) not in (False, "group") and not static
    return LayerScheme(quantizer.wbits, quantizer.groupsize, quantizer.sym, actorder)


def _target(
    qep: QEP,
    site: Site,
    inputs: Inputs,
    weight: Tensor,
    factored: Factor | None,
    order: Tensor | None,
) -> Tensor:
    """What the stacked rows of a site aim at under error propagation."""
    assert inputs.drift is not None  # the full-precision stream runs
    target = qep.correct(weight, inputs.H, inputs.drift, factored, order)
    rows = [layer.shape[0] for layer in site.layers]
    for layer, kept, moved in zip(site.layers, weight.split(rows), target.split(rows), strict=True):
        if not qep.applies(layer.name):
            moved.copy_(kept)
    return target


def _record(layer: Layer, part: Solution, energy: float, site_rows: int) -> LayerRecord:
    rows, cols = layer.shape
    error = part.error.sum().item()
    return LayerRecord(
        name=layer.name,
        rows=rows,
        cols=cols,
        error=error,
        relative_error=error / energy if energy else 0.0,
        rtn_error=part.rtn_error.sum().item(),
        damp=part.damp,
        seconds=sum(part.seconds.values()) * rows / site_rows,
        damp_tries=part.damp_tries,
        dead_columns=part.dead,
        fallback_rows=part.fallback_rows,
        polish_gain=part.polish_gain,
        polish_seconds=part.seconds.get("polish", 0.0) * rows / site_rows,
        calls=max(layer.calls, 1),
    )
