"""Turn a quantized checkpoint into another format, with the same codes and grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from optq.core.weight import LayerScheme, QuantizedWeight
from optq.errors import ModelError
from optq.formats import detect, quantization
from optq.formats.notices import notices
from optq.formats.place import place_of
from optq.formats.reader import packed_tensors, quantized_layers, read_layer
from optq.formats.scheme import Format, heads_of
from optq.formats.writer import Writer
from optq.model.blocks import find_blocks
from optq.model.checkpoint import TOGETHER, Checkpoint
from optq.model.dense import left_over
from optq.model.lacking import lacking
from optq.model.names import disk_names
from optq.model.source import empty_model


def export(
    checkpoint: Checkpoint,
    target: Path,
    form: Format,
    force: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> int:
    """Write ``target`` in ``form``, whole or not at all; returns the number of packed layers.

    ``notice`` is told of what a run that was cut off has left beside ``target``.

    Raises ``SettingError`` where ``form`` cannot hold a layer exactly, before anything is named
    ``target``; :class:`ModelError` where ``checkpoint`` is not quantized, or not whole.
    """
    names = quantized_layers(checkpoint)
    scheme, settings = detect(checkpoint), quantization(checkpoint) or {}
    assert scheme is not None  # quantized_layers has refused a plain model
    skeleton = empty_model(checkpoint)
    blocks = find_blocks(skeleton)
    there = dict.fromkeys([*checkpoint.files, *(f"{name}.weight" for name in names)])
    on_disk = disk_names(skeleton, there)
    if lacks := lacking(skeleton, there):
        raise ModelError(f"{checkpoint.folder} lacks {lacks[0]}", TOGETHER)
    conv1d = [layer.name for block in blocks for layer in block.layers if layer.conv1d]
    turned = {on_disk.get(f"{name}.weight", "").removesuffix(".weight") for name in conv1d}
    rest = left_over(checkpoint, on_disk, skeleton, blocks, set(names))
    every = [bank for block in blocks for bank in block.banks]
    first = {on_disk.get(f"{bank.layers[0].name}.weight"): bank for bank in every}
    banks = {n: first[f"{n}.weight"] for n in names if f"{n}.weight" in first}
    skipped = [bank for bank in every if bank not in banks.values()]
    with place_of(target, checkpoint, force, notice) as place:
        if layer := next(map(scheme.layer, [*banks, *names]), None):
            head = bool(heads_of(names))
            for line in notices(form, layer, skeleton, [*banks.values()], skipped, on_disk, head):
                notice(line)
        writer = Writer(place, checkpoint, form, skeleton.config.dtype)
        for name in names:  # one at a time: memory holds one layer
            weight = read_layer(checkpoint, name, scheme)
            layer = _as_it_is(scheme.layer(name), weight)
            form.check(name, weight.rows, weight.cols, layer, name in turned)
            writer.commit({name: (weight, layer)})
        percdamp, packed = settings.get("damp_percent", 0.0), packed_tensors(checkpoint)
        writer.finish(replace(rest, replaced=packed), percdamp)
    return len(names)


def _as_it_is(declared: LayerScheme | None, weight: QuantizedWeight) -> LayerScheme:
    """What the config says, where the tensors bear it out."""
    assert declared is not None  # read_layer has refused it
    sym, actorder = declared.sym and weight.sym, not weight.consecutive
    return replace(declared, sym=sym, actorder=actorder)
