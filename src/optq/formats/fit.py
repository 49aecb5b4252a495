"""Whether a format can hold all layers of a model as asked; if not, what to ask for instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from optq.core.grid import BITS
from optq.core.weight import UNCODED, LayerScheme
from optq.errors import SettingError
from optq.formats.compressed_tensors import COMPRESSED_TENSORS
from optq.formats.gptq import GPTQ_V1
from optq.formats.scheme import Format
from optq.model.blocks import Block
from optq.model.layer import Layer

GROUPSIZES = (256, 128, 64, 32, 16, -1)  # that are proposed


def check_layers(
    form: Format,
    blocks: Sequence[Block],
    scheme: LayerScheme,
    others: Sequence[Format] = (GPTQ_V1, COMPRESSED_TENSORS),  # gptq_v2 holds what gptq does
) -> None:
    """Refuse at once all layers that ``form`` cannot hold. Raises ``SettingError``.

    What the remedy names, of options and ``others``, has been tried on every layer.
    """
    layers = [layer for block in blocks for layer in block.layers]
    refused = _refused(form, scheme, layers)
    if not refused:
        return
    error = next(iter(refused.values()))
    ends = {name.rpartition(".")[2]: None for name in refused}
    cause = f"{error.cause} (misfits: {len(refused)} of {len(layers)} layers, {', '.join(ends)})"
    changes = [("--static-groups", form, replace(scheme, actorder=False))]
    changes += [(f"--format {each.name}", each, scheme) for each in others]
    changes += [(f"--wbits {n}", form, replace(scheme, wbits=n)) for n in BITS]
    ways = [f"choose {w}" for w, other, new in changes if not _refused(other, new, layers)]
    for way, other, changed in [("", form, scheme), *changes]:
        if way and ways:  # two changes only where one does not do
            break
        tried = {n: _refused(other, _sized(changed, n), layers) for n in GROUPSIZES}
        if sizes := " or ".join(str(n) for n, misfits in tried.items() if not misfits):
            ways.insert(0, " ".join(f"choose {way} --groupsize {sizes}".split()))
    banks = [bank for block in blocks for bank in block.banks]
    heads = {layer.name for block in blocks if block.head for layer in block.layers}
    rest = {layer.name for layer in layers} - refused.keys() - heads
    for bank in banks:  # one of them is dense: then all are
        own = {layer.name for layer in bank.layers}
        if not own <= rest:
            rest -= own
    if heads & refused.keys():
        ways.append("leave out --head")
    elif rest:  # the pattern says also what another one has left dense
        dense = {name for block in blocks for name in block.linears} - rest - heads
        pattern = _pattern(dense, rest, {bank.name for bank in banks})
        ways.append(f"leave the misfits dense: --skip '{pattern}'")
    raise SettingError(cause, ", or ".join(ways) or "give another model: no options fit this one")


def of_layer(scheme: LayerScheme, layer: Layer) -> LayerScheme:
    """The run's scheme, with the bits that the layer has of its own."""
    if scheme.wbits == UNCODED:
        return replace(scheme, conv1d=layer.conv1d)
    return scheme if layer.wbits is None else replace(scheme, wbits=layer.wbits)


def _sized(scheme: LayerScheme, groupsize: int) -> LayerScheme:
    """One group to a row has no order to follow."""
    return replace(scheme, groupsize=groupsize, actorder=scheme.actorder and groupsize != -1)


def _refused(form: Format, scheme: LayerScheme, layers: Sequence[Layer]) -> dict[str, SettingError]:
    found = {}
    for layer in layers:
        try:
            form.check(layer.name, *layer.shape, of_layer(scheme, layer), layer.conv1d)
        except SettingError as error:
            found[layer.name] = error
    return found


def _pattern(names: Collection[str], others: Collection[str], banks: Collection[str]) -> str:
    """A regular expression that finds ``names`` and none of ``others``.

    ``banks``: what experts are called together; their layers have a number and a name more.
    """

    def parts(all_names: Collection[str]) -> list[set[str]]:
        above = {name: name.rsplit(".", 2)[0] for name in all_names}
        plain = {name for name in all_names if above[name] not in banks}
        return [plain, {*above.values()} & {*banks}]

    found = []
    for own, rest, end in zip(parts(names), parts(others), ("$", r"\.\d+\."), strict=True):
        start, words = r"\.", {name.rpartition(".")[2] for name in own}
        if words & {name.rpartition(".")[2] for name in rest}:
            start, words = "^", own
        if words:
            found.append(f"{start}({'|'.join(sorted(map(re.escape, words)))}){end}")
    return "|".join(found)
