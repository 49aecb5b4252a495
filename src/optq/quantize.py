"""A quantization under way: every site is solved, and every block handed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from optq.core.error import output_energy
from optq.core.gptq import GPTQ
from optq.core.grid import Storage
from optq.core.hessian import Factor
from optq.core.obq import OBQ
from optq.core.qep import QEP
from optq.core.rtn import RTN
from optq.core.solution import Solution
from optq.core.weight import QuantizedWeight
from optq.errors import ModelError, NumericsError
from optq.formats.scheme import Format, LayerScheme, Solved
from optq.model.blocks import Block, Layer, release
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow, Inputs, Site
from optq.model.source import disk_names
from optq.record import LayerRecord

Quantizer = RTN | GPTQ | OBQ
BATCH_TOKENS = 4096  # of one coroutine: enough to keep matrix products busy


@dataclass(frozen=True)
class Progress:
    """One site is solved."""

    block: int
    blocks: int
    site: str  # its first layer
    layers: list[LayerRecord]


class Sink(Protocol):
    """What takes the layers of each block as soon as all are solved."""

    def commit(self, block: int, layers: Solved, records: Sequence[LayerRecord]) -> None: ...


class Quantization:
    """One model, one quantizer: each site is solved, and each block handed to ``sink``.

    ``names`` are those of :func:`names_on_disk`. With ``keep`` the weights of finished blocks stay.
    """

    def __init__(
        self,
        model: Any,
        blocks: list[Block],
        names: dict[str, str],
        quantizer: Quantizer,
        qep: QEP | None,
        storage: Storage,
        sink: Sink,
        keep: bool,
        progress: Callable[[Progress], None],
    ) -> None:
        self.model, self.blocks, self.names, self.keep = model, blocks, names, keep
        self.quantizer, self.qep, self.storage = quantizer, qep, storage
        self.sink, self.progress = sink, progress
        self.scheme = layer_scheme(quantizer)
        self.solved: dict[str, tuple[QuantizedWeight, LayerScheme]] = {}  # of the current block
        self.records: list[LayerRecord] = []
        self.seconds = dict.fromkeys(("forward", "hessian", "factor", "solve", "write"), 0.0)

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
            name = self.names[f"{layer.name}.weight"].removesuffix(".weight")
            self.solved[name] = part, self.scheme
            records.append(_record(layer, part, energy.sum().item(), len(weight)))
        self.records += records
        for stage, seconds in solution.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.progress(Progress(site.block.index, len(self.blocks), site.layers[0].name, records))

    def done(self, block: Block) -> None:
        """A block that no batch needs any more is handed on, and leaves the memory."""
        start = time.perf_counter()
        self.sink.commit(block.index, self.solved, self.records)
        self.solved, self.records = {}, []
        self.seconds["write"] += time.perf_counter() - start
        if self.keep:
            block.module.to("cpu")
        else:
            release(block, self.blocks)


def names_on_disk(
    model: Any, blocks: list[Block], checkpoint: Checkpoint, quantizer: Quantizer, form: Format
) -> dict[str, str]:
    """The names on disk of the model's tensors. Refuses a layer that cannot be written."""
    names, scheme = disk_names(model, checkpoint.files), layer_scheme(quantizer)
    for layer in (layer for block in blocks for layer in block.layers):
        form.check(layer.name, *layer.shape, scheme, layer.transposed)
        if f"{layer.name}.weight" not in names:
            raise ModelError(
                f"{layer.name} is not on disk as one tensor", "leave it dense with --skip"
            )
    return names


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
