"""Whether a format can hold all layers of a model as asked; if not, what to ask for instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from optq.core.grid import BITS
from optq.core.weight import LayerScheme
from optq.errors import SettingError
from optq.formats.scheme import Format
from optq.model.blocks import Block
from optq.model.layer import Layer

GROUPSIZES = (256, 128, 64, 32, 16, -1)  # that are proposed


def check_layers(form: Format, blocks: Sequence[Block], scheme: LayerScheme) -> None:
    """Refuse at once all layers that ``form`` cannot hold. Raises ``SettingError``.

    What the remedy names has been tried on every layer.
    """
    layers = [layer for block in blocks for layer in block.layers]
    refused = _refused(form, layers, scheme)
    if not refused:
        return
    error = next(iter(refused.values()))
    ends = {name.rpartition(".")[2]: None for name in refused}
    cause = f"{error.cause} (misfits: {len(refused)} of {len(layers)} layers, {', '.join(ends)})"
    ways = []
    for option, values in (("groupsize", GROUPSIZES), ("wbits", BITS)):
        others = {n: replace(scheme, **{option: n}) for n in values}  # type: ignore[arg-type]
        fitting = [str(n) for n, other in others.items() if not _refused(form, layers, other)]
        if fitting:
            ways.append(f"choose --{option} {' or '.join(fitting)}")
    rest = {layer.name for layer in layers} - refused.keys()
    if rest:  # the pattern says also what another one has left dense
        dense = {name for block in blocks for name in block.linears} - rest
        ways.append(f"leave the misfits dense: --skip '{_pattern(dense, rest)}'")
    raise SettingError(cause, ", or ".join(ways) or error.remedy)


def _refused(form: Format, layers: Sequence[Layer], scheme: LayerScheme) -> dict[str, SettingError]:
    found = {}
    for layer in layers:
        try:
            form.check(layer.name, *layer.shape, scheme, layer.conv1d)
        except SettingError as error:
            found[layer.name] = error
    return found


def _pattern(names: Collection[str], others: Collection[str]) -> str:
    """A regular expression that finds ``names`` and none of ``others``."""
    start, words = r"\.", {name.rpartition(".")[2] for name in names}
    if words & {name.rpartition(".")[2] for name in others}:
        start, words = "^", set(names)
    return f"{start}({'|'.join(sorted(map(re.escape, words)))})$"
