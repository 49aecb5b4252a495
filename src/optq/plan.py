"""What a run will do, made from headers and shapes alone: no weight is read, and no text.

The checkpoint's layout, the model without weights and its blocks say what will be quantized and
what stays dense, and why; the format says how many bytes that makes, :mod:`optq.forecast` what the
run takes. :meth:`Plan.check` refuses what the disk has no room for: a run does so before its work.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optq.budget import Budget, Mixed
from optq.core.solver import Solver
from optq.data.calibration import calibration_tokens
from optq.errors import OutputError, SettingError
from optq.forecast import NOTHING, Run
from optq.formats.fit import of_layer
from optq.formats.notices import notices
from optq.formats.scheme import Format
from optq.formats.writer import SHARD_BYTES
from optq.machine import resident, speed_of
from optq.model.activations import SHARE
from optq.model.blocks import Block, find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.dense import reasons
from optq.model.head import head_shape
from optq.model.lacking import lacking, misshapen
from optq.model.layer import Layer
from optq.model.memory import free
from optq.model.shapes import outside, shape_of, sites_of
from optq.model.source import empty_model, sequence_length, unloadable
from optq.quantize import names_on_disk
from optq.report.tables import size
from optq.tune import Tune

IN_HEADER = 160  # bytes of a tensor in a header and in the index, beside its name in both


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint, its model without weights, and the model's blocks."""

    checkpoint: Checkpoint
    model: Any
    blocks: list[Block]
    skip: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, skip: str | None, head: int | None = None) -> Skeleton:
        model = empty_model(checkpoint).eval()
        model.to(model.config.dtype)  # it is made in float32
        return cls(checkpoint, model, find_blocks(model, skip, head), skip)


@dataclass(frozen=True)
class Dense:
    """Tensors that stay as they are, all for one reason; ``names`` with ``*`` for numbers."""

    why: str
    tensors: int
    bytes: int
    names: list[str]


@dataclass(frozen=True)
class Plan:
    """What a run would do. Sizes are bytes; ``sites`` is None where they are found in the run.

    ``files`` is what of ``disk`` batches hold meanwhile.
    """

    blocks: int
    sites: int | None
    layers: int
    weights: int
    experts: int
    dense: list[Dense]
    packed_bytes: int
    dense_bytes: int
    bits_per_weight: float
    memory: int
    memory_available: int
    device: str
    device_memory: int
    device_memory_available: int
    disk: int
    disk_free: int
    files: int
    seconds: float
    notices: list[str]

    @property
    def bytes(self) -> int:
        return self.packed_bytes + self.dense_bytes

    def told(self) -> dict[str, Any]:
        """All of it for a program, what a run would say before it begins among the notices."""
        notices = [*self.notices, *self.warnings()]
        return asdict(self) | {"bytes": self.bytes, "notices": notices}

    def check(self, target: str | Path | None) -> None:
        """Raises :class:`OutputError` where the result, and what a run keeps, has no room."""
        if target is not None and self.disk > self.disk_free:
            needed, free = size(self.disk), size(self.disk_free)
            raise OutputError(
                f"the checkpoint needs {needed}, and {free} is free at {target}",
                "make room, or choose a folder on another disk",
            )

    def warnings(self) -> Iterator[str]:
        """What a run would say before it begins: memory that will not do, if nothing else goes."""
        pairs = [("main memory", self.memory, self.memory_available)]
        if self.device != "cpu":
            pairs.append((self.device, self.device_memory, self.device_memory_available))
        for where, needed, there in pairs:
            if needed > there:
                yield (
                    f"the run may need {size(needed)} of {where}, and {size(there)} is available:"
                    " fewer --nsamples or a shorter --seqlen take less"
                )


def make_plan(
    skeleton: Skeleton,
    form: Format,
    quantizer: Solver | Mixed,
    streams: int,
    samples: int,
    seqlen: int,
    device: torch.device,
    output: Path | None,
    activation_memory: int | None = None,
    timed: bool = True,
    tune: Tune = NOTHING,
) -> Plan:
    """The plan of a run; ``timed``: with an estimate of its time, which takes a moment."""
    checkpoint, model, blocks = skeleton.checkpoint, skeleton.model, skeleton.blocks
    names, scheme = names_on_disk(model, blocks, checkpoint, quantizer, form), quantizer.scheme()
    if not checkpoint.whole:
        _check_fit(checkpoint, model, blocks, names)
    banks = [bank for block in blocks for bank in block.banks]
    skipped = [bank for block in blocks for bank in block.dense]
    head = any(block.head for block in blocks)
    said = [*notices(form, scheme, model, banks, skipped, names, head), *_of_files(checkpoint)]
    sites, held, counted = sites_of(model, blocks, seqlen, said)
    budget = None
    if isinstance(quantizer, Mixed):
        flat = (site for block in blocks for site in sites[block])
        budget = Budget.of(quantizer, flat, form, model.dtype, checkpoint, names)
        quantizer = quantizer.at(budget.uniform())
        scheme = quantizer.scheme()
        said.append("a pass before the run finds out which layers get how many bits")
    layers = [layer for block in blocks for site in sites[block] for layer in site.layers]
    shapes = Counter((layer.shape, of_layer(scheme, layer)) for layer in layers)
    packed_of = {
        (shape, own): sum(each.nbytes for each in form.layout(*shape, own, model.dtype).values())
        for shape, own in shapes
    }
    packed = budget.bytes if budget else sum(packed_of[kind] * n for kind, n in shapes.items())
    weights = sum(rows * columns * count for ((rows, columns), _), count in shapes.items())

    def bytes_of(layer: Layer) -> int:
        return packed_of[layer.shape, of_layer(scheme, layer)]

    quantized = {layer.name for layer in layers}
    why = reasons(model, blocks, skeleton.skip, names, checkpoint.layout, quantized)
    dense = list(_dense(checkpoint, why))
    kept = sum(each.bytes for each in dense)
    cpu, apart = torch.device("cpu"), device.type != "cpu"
    run = Run(
        blocks=tuple(
            shape_of(block, sites[block], bytes_of, names, checkpoint) for block in blocks
        ),
        held=held,
        samples=samples,
        seqlen=seqlen,
        streams=streams,
        item=model.dtype.itemsize,
        **outside(checkpoint, model, blocks, names, why),
        quantizer=quantizer,
        device=device,
        limit=int(SHARE * free(device)) if activation_memory is None else activation_memory,
        host_limit=int(SHARE * free(cpu)) if apart else 0,
        head=head_shape(model),
        tune=tune,
    )
    peak, libraries = run.peak(), resident()
    seconds = run.seconds(speed := speed_of(device), packed + kept) if timed else 0.0
    seconds += run.probing(speed) if timed and budget else 0.0
    # What batches hold, or all that is packed once more, before the dense tensors come.
    beside = packed + (peak.files if tune.model is None else max(peak.files, packed + kept))
    return Plan(
        blocks=sum(not block.head for block in blocks),
        sites=counted,
        layers=len(layers),
        weights=weights,
        experts=sum(len(bank.inner) for bank in banks),
        dense=dense,
        packed_bytes=packed,
        dense_bytes=kept,
        bits_per_weight=8 * packed / max(weights, 1),
        memory=peak.host + libraries,
        memory_available=free(cpu) + libraries,
        device=str(device),
        device_memory=peak.device,
        device_memory_available=free(device) if apart else 0,
        disk=_disk(checkpoint, form, layers, packed + kept, beside, why) if output else 0,
        files=peak.files,
        disk_free=_free(output) if output else 0,
        seconds=seconds,
        notices=said,
    )


def calibration_size(
    calib: object, model: Any, nsamples: int, seqlen: int | None
) -> tuple[int, int]:
    """How many samples of how many tokens there will be; ``calib`` may be the token ids."""
    if isinstance(calib, torch.Tensor):
        samples, length = calibration_tokens(calib, None, 1, 1, 0).shape
        return samples, sequence_length(model, length)
    for name, value in (("nsamples", nsamples), ("seqlen", 1 if seqlen is None else seqlen)):
        if value < 1:
            raise SettingError(f"{name} is {value}", "choose 1 or more")
    return nsamples, sequence_length(model, seqlen)


def _check_fit(
    checkpoint: Checkpoint, model: Any, blocks: list[Block], names: Mapping[str, str]
) -> None:
    """Refuse weights that are not those of the model, as loading them will."""
    kind, _, remedy = unloadable(checkpoint)
    unfit = f"the weights in {checkpoint.folder} do not fit {type(model).__name__}"
    if lacks := lacking(model, checkpoint.layout, names):
        raise kind(f"{unfit}: {lacks[0]} is missing", remedy)
    banks = [bank for block in blocks for bank in (*block.banks, *block.dense)]
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer in (layer for bank in banks for layer in bank.layers):
        wanted.pop(f"{layer.name.rsplit('.', 2)[0]}.{layer.attribute}", None)  # may be transposed
        wanted[f"{layer.name}.weight"] = layer.shape
    for name, on_disk in names.items():
        found = checkpoint.layout.get(on_disk)
        if found is not None and name in wanted and tuple(found.shape) != wanted[name]:
            raise kind(f"{unfit}: {misshapen(on_disk, found.shape, wanted[name])}", remedy)


def _of_files(checkpoint: Checkpoint) -> Iterator[str]:
    """What a run will want of the checkpoint's files that a plan does not."""
    if cut := checkpoint.cut():
        yield f"{cut} is shorter than its header says: a run refuses it"
    kinds = ("tokenizer*", "*.model", "vocab.*", "tekken.json")
    if not any(True for kind in kinds for _ in checkpoint.folder.glob(kind)):
        yield "the folder has no tokenizer, which a run needs"


def _dense(checkpoint: Checkpoint, why: Mapping[str, str]) -> Iterator[Dense]:
    of: dict[str, list[str]] = {}
    for name, reason in why.items():
        of.setdefault(reason, []).append(name)
    for reason, names in of.items():
        alike = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
        count = sum(checkpoint.layout[name].nbytes for name in names)
        yield Dense(reason, len(names), count, [*alike])


def _disk(
    checkpoint: Checkpoint,
    form: Format,
    layers: list[Layer],
    whole: int,
    before: int,
    why: Mapping[str, str],
) -> int:
    """Bytes at the peak, where the tensors are ``whole`` at the end.

    A small model is written once more, into one file. ``before`` the dense tensors come, what
    batches hold in files is there beside the packed ones.
    """
    names = [*why, *(f"{layer.name}.{suffix}" for layer in layers for suffix in form.suffixes)]
    headers = sum(2 * len(name) + IN_HEADER for name in names)
    beside = sum(path.stat().st_size for path in checkpoint.companions() if path.is_file())
    return max(whole * (2 if whole <= SHARD_BYTES else 1), before) + headers + beside


def _free(output: Path) -> int:
    """What is free where the result will lie, with what a run that was cut off holds of it."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    room = output.with_name(f".{output.name}.partial")
    left = sum(path.stat().st_size for path in room.rglob("*") if path.is_file())
    return shutil.disk_usage(there).free + left
