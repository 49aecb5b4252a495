"""A quantization under way: every site is solved, and every block handed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from optq import __version__
from optq.budget import Mixed
from optq.core.grid import Storage
from optq.core.pruning import Pruner
from optq.core.qep import QEP
from optq.core.smoothquant import SmoothQuant
from optq.core.solver import Solver
from optq.core.weight import LayerScheme, QuantizedWeight
from optq.errors import ModelError, SettingError
from optq.formats.dense import DENSE
from optq.formats.fit import check_layers, of_layer
from optq.formats.scheme import Format
from optq.formats.writer import Kept
from optq.model.activations import Activations
from optq.model.batch import Passed
from optq.model.blocks import Block, Site
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.inputs import SiteSums
from optq.model.layer import Layer
from optq.model.names import disk_names
from optq.model.shards import Shards
from optq.model.smoothing import Smoother
from optq.model.weights import Weights
from optq.ranks import Ranks
from optq.record import (
    BlockRecord,
    Found,
    LayerRecord,
    RunRecord,
    SiteRecord,
    TunedBlock,
)
from optq.recording import grids, layer_record, smoothing_of
from optq.solving import Outcome, Solving, in_turn, together
from optq.tuning import Tuner

BATCH_TOKENS = 4096  # of one coroutine: enough to keep matrix products busy


@dataclass(frozen=True)
class Progress:
    """One site is solved, or one expert's part of it; or a block is ``tuned``."""

    block: int
    blocks: int
    site: str  # its first layer
    layers: list[LayerRecord]
    tuned: TunedBlock | None = None


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
        quantizer: Solver | Mixed,
        qep: QEP | None,
        storage: Storage,
        sink: Kept,
        keep: bool,
        progress: Callable[[Progress], None],
        shards: Shards | None = None,
        ranks: Ranks = Ranks(),
    ) -> None:
        self.model, self.blocks, self.names, self.keep = model, blocks, names, keep
        self.solving = Solving(quantizer, qep, storage, ranks)
        self.sink, self.progress, self.shards, self.ranks = sink, progress, shards, ranks
        self.scheme = quantizer.scheme()
        self.solved: dict[str, tuple[QuantizedWeight, LayerScheme]] = {}  # of the current block
        self.records: list[LayerRecord] = []
        self.sites: list[SiteRecord] = []
        self.tuned: TunedBlock | None = None
        self.restoring = False  # the current block is finished already
        self.smoother: Smoother | None = None
        if isinstance(quantizer, SmoothQuant):
            self.smoother = Smoother(quantizer, names, ranks)
        every = [layer for block in blocks for layer in block.layers]
        self.layers = {names[f"{x.name}.weight"].removesuffix(".weight"): x for x in every}
        self.places = {on_disk: name for name, on_disk in names.items()}
        self.seconds = dict.fromkeys(("forward", "hessian", "factor", "solve", "write"), 0.0)

    def calibrate(
        self, tokens: Tensor, activations: Activations, tuner: Tuner | None = None
    ) -> None:
        """Take all calibration tokens ``[samples, tokens]`` through the model once.

        ``activations`` keeps what they hold, and says on which device. ``tuner`` tunes each block.
        """
        if self._nothing_left():
            return
        size = max(1, BATCH_TOKENS // tokens.shape[1])
        batches = tuner.settings.batches(tokens) if tuner else list(tokens.split(size))
        # What is on its way to disk leaves the memory, block by block.
        weights = Weights(self.model, self.blocks, activations.device, self.keep, self.shards)
        then = self.solve, self.done, self.solving.qep is not None, activations, self.restore
        flow = Flow(self.model, self.blocks, batches, weights, *then, self.ranks, together)
        flow.smoother = self.smoother
        if tuner is not None:
            flow.tune = partial(self.tune, tuner)
        flow.run()
        weights.complete()
        self.seconds |= flow.seconds

    def solve(self, sites: Iterator[tuple[Site, SiteSums | None]]) -> None:
        """Quantize the stacked rows of each site and put the weights back, some sites at a time.

        A site without sums is another rank's, an expert; else the ranks share the rows.
        """
        for some in in_turn(sites, self.ranks):
            for (site, _), outcome in zip(some, self.solving.solve(some), strict=True):
                self._put(site, outcome)

    def _put(self, site: Site, outcome: Outcome) -> None:
        """Solved: into the model, and among what goes to disk with the block."""
        rows = [layer.shape[0] for layer in site.layers]
        parts, energies = outcome.solution.split(rows), outcome.energy.split(rows)
        records = []
        for layer, part, energy in zip(site.layers, parts, energies, strict=True):
            layer.put(part.weight)
            name = self.names[f"{layer.name}.weight"].removesuffix(".weight")
            self.solved[name] = part, of_layer(self.scheme, layer)
            told = site, layer, part, energy, outcome, sum(rows)
            records.append(layer_record(*told, isinstance(self.solving.quantizer, Pruner)))
        self.records += records
        first = site.layers[0].name
        self.sites.append(
            SiteRecord(
                site=first,
                layers=[x.name for x in site.layers],
                diagonal=outcome.diagonal,
                smoothing=smoothing_of(site),
            )
        )
        for stage, seconds in outcome.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.progress(Progress(site.block.index, len(self.blocks), first, records))

    def tune(self, tuner: Tuner, block: Block, passages: list[tuple[Passed, Passed]]) -> bool:
        """What is solved of a block is tuned; whether its weights are others now."""
        start = time.perf_counter()
        weights = {self.layers[name]: weight for name, (weight, _) in self.solved.items()}
        if not weights:
            return False
        best, self.tuned = tuner.tune(block, weights, passages)
        if best is not None:
            for name, (_, scheme) in self.solved.items():
                self.solved[name] = best[self.layers[name]], scheme
            made = {layer.name: grids(weight) for layer, weight in best.items()}
            self.records = [each.model_copy(update=made[each.name]) for each in self.records]
        self.seconds["tune"] = self.seconds.get("tune", 0.0) + time.perf_counter() - start
        done = block.index, len(self.blocks), block.name, self.records, self.tuned
        self.progress(Progress(*done))
        return best is not None

    def counted(self, records: Sequence[LayerRecord]) -> list[LayerRecord]:
        """With the calls of layers whose module later blocks share: it was called again since."""
        every = [layer for block in self.blocks for layer in block.layers]
        told = zip(*self.ranks.gather([layer.calls for layer in every], "records"), strict=True)
        most = {layer.name: max(calls) for layer, calls in zip(every, told, strict=True)}
        return [
            record.model_copy(update={"calls": most[record.name] or record.calls})
            for record in records
        ]

    def _nothing_left(self) -> bool:
        """Whether an earlier run has finished all blocks: nobody then needs what runs through them.

        But for how often a layer is called, where a module is part of several blocks.
        """
        modules = [module for block in self.blocks for module in block.module.modules()]
        finished, names = self.ranks.share(lambda: (self.sink.finished(), [*self.sink.layers]))
        if finished < len(self.blocks) or len({*modules}) < len(modules):
            return False
        for name in names:
            self.layers[name].solved = True
        return True

    def restore(self, block: Block) -> Iterator[tuple[Layer, Tensor]] | None:
        """The weights that an earlier run has put into a block, read back from its file."""
        found = self.ranks.share(self._read_back)
        self.restoring = found is not None
        if found is None:
            return None
        layers, changed = found
        for name, tensor in changed.items():
            parameter = self.model.get_parameter(self.places[name])
            parameter.data = tensor.to(parameter.device)
        return ((self.layers[name], weight.weight) for name, weight in layers)

    def _read_back(self) -> Any:
        found = self.sink.restored()
        if found is None or self.ranks.size == 1:
            return found
        layers, changed = found
        return list(layers), changed

    def done(self, block: Block, error: float | None) -> None:
        """A block that no batch needs any more is handed on; ``error`` as :class:`BlockRecord`."""
        if self.restoring:
            return
        start = time.perf_counter()
        calls = {layer.name: layer.calls for layer in block.layers}
        records = [
            each.model_copy(update={"calls": calls.get(each.name, each.calls)})
            for each in self.records
        ]
        left = BlockRecord(block=block.name, error=error)
        found = Found(block=left, layers=records, sites=self.sites, tuned=self.tuned)
        changed = self.smoother.changed if self.smoother else {}
        self.sink.commit(self.solved, found, {self.names[n]: x for n, x in changed.items()})
        self.solved, self.records, self.sites, self.tuned = {}, [], [], None
        self.seconds["write"] += time.perf_counter() - start


def names_on_disk(
    model: Any, blocks: list[Block], checkpoint: Checkpoint, quantizer: Solver | Mixed, form: Format
) -> dict[str, str]:
    """The names on disk of the model's tensors. Refuses a layer that cannot be written."""
    names = disk_names(model, checkpoint.files)
    check_experts(quantizer.scheme(), blocks)
    check_layers(form, blocks, quantizer.scheme())
    for layer in (layer for block in blocks for layer in block.layers):
        if f"{layer.name}.weight" not in names:
            raise ModelError(
                f"{layer.name} is not on disk as one tensor", "leave it dense with --skip"
            )
        if isinstance(quantizer, Pruner):
            quantizer.check_layer(layer.name, *layer.shape)
        if form is DENSE and names[f"{layer.name}.weight"] not in checkpoint.files:
            raise ModelError(
                f"{layer.name} is not on disk as one tensor, and no reader knows one of its own",
                "quantize it as well with --wbits, or leave it dense with --skip",
            )
    return names


def check_experts(scheme: LayerScheme, blocks: Sequence[Block]) -> None:
    """Refuse experts where activations are quantized. Errors: ``SettingError``."""
    bank = next((bank for block in blocks for bank in block.banks), None)
    if scheme.abits is not None and bank is not None:
        raise SettingError(
            f"{bank.name} are experts, whose activations cannot be quantized yet",
            f"leave them dense: --skip '{bank.name.rpartition('.')[2]}'",
        )


def record_of(work: Quantization, sink: Kept, **told: Any) -> RunRecord:
    """The record of a run whose blocks are all done; ``told`` is what the run knows of itself."""
    layers = work.counted([layer for found in sink.found for layer in found.layers])
    solved = {layer.name for layer in layers}
    return RunRecord(
        optq=__version__,
        bits_per_weight=8 * sink.bytes / max(sink.weights, 1),
        bytes=sink.bytes,
        dense=[name for block in work.blocks for name in block.linears if name not in solved],
        layers=layers,
        sites=[site for found in sink.found for site in found.sites],
        blocks=[found.block for found in sink.found],
        tuned=[found.tuned for found in sink.found if found.tuned],
        **told,
    )
