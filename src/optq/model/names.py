"""What a model's tensors are called on disk: as transformers renames them, and never from a table.

An expert's projection is called ``EXPERTS.7.gate_proj`` here, as
:class:`optq.model.experts.Bank` has it. On disk it has a name of its own, or one tensor has it
with the others, which transformers then loads as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from optq.model.experts import PARTS, bank_of, is_bank

MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # what it calls projections


def disk_names(model: Any, names_on_disk: Iterable[str]) -> dict[str, str]:
    """The name on disk of each of the model's tensors that stands there one to one.

    transformers 5 renames while it loads (``language_model.model.`` becomes
    ``model.language_model.``, a base model's tensors get their prefix); this asks it for the same
    renamings. Of tensors that it merges from several on disk only experts are kept: each
    projection of each has the name that :class:`optq.model.experts.Bank` gives it. Where the disk
    has them in one tensor too, it is the name that the projection is to have: :func:`_apart`.
    """
    rename, converters = renaming(model)
    state = model.state_dict()
    banks = [bank_of(name, module) for name, module in model.named_modules() if is_bank(module)]
    experts = {x.name: f"{bank.name}.{x.attribute}" for bank in banks for x in bank.layers}
    apart, fused = {_alike(name): name for name in experts}, {*experts.values()}
    names: dict[str, str] = {}
    for on_disk in names_on_disk:
        in_model, converted = rename(on_disk)
        if converted is None and in_model in state:
            names[in_model] = on_disk
        elif converted is not None:
            of_one = expert_name(in_model, converted, converters, on_disk)
            if not of_one and in_model in fused and _sources(converted, converters) == [converted]:
                names.setdefault(in_model, on_disk)  # all experts: transposed, say
            in_model = of_one or ""
        name = in_model.removesuffix(".weight")
        if name in experts or (name := apart.get(_alike(name), "")):
            names[f"{name}.weight"] = on_disk
    recurrent = any(isinstance(module, nn.Conv1d) for module in model.modules())
    for name, whole in experts.items():
        if whole in names:
            names.setdefault(f"{name}.weight", _apart(name, names[whole], recurrent))
    return names


def merges(model: Any, name_on_disk: str) -> bool:
    """Whether transformers merges this tensor, one of an expert's, with others while it loads."""
    return renaming(model)[0](name_on_disk)[1] is not None


def renaming(model: Any) -> tuple[Callable[[str], tuple[str, str | None]], list[Any]]:
    """What renames a tensor on disk as transformers does, and its converters.

    The second of what the first gives is the pattern of the converter that takes the tensor.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    around = renamings, converters, model.base_model_prefix, model.state_dict()
    return (lambda name: rename_source_key(name, *around)), converters


def expert_name(merged: str, pattern: str, converters: list[Any], on_disk: str) -> str | None:
    """The name of one projection of one expert, that is merged with others into ``merged``."""
    bank, _, attribute = merged.rpartition(".")
    sources = _sources(pattern, converters)
    number = re.search(r"\.(\d+)\.\w+\.weight$", on_disk)
    parts = PARTS.get(attribute, (attribute,))
    if number is None or len(parts) != len(sources):
        return None
    return f"{bank}.{number[1]}.{parts[sources.index(pattern)]}.weight"


def _sources(pattern: str, converters: list[Any]) -> list[str]:
    """What the converter that ``pattern`` belongs to takes."""
    return next(each.source_patterns for each in converters if pattern in each.source_patterns)


def _apart(name: str, fused: str, recurrent: bool) -> str:
    """The name on disk for one projection of one expert that the source has in ``fused``.

    What vLLM's loaders read: ``EXPERTS.7.gate_proj.weight``, where ``EXPERTS`` is on disk, and
    Mixtral's words in a ``block_sparse_moe``, but for a hybrid model's (its Granite 4).
    """
    _, expert, part = name.rsplit(".", 2)
    place = re.sub(r"\.experts(\..*)?$", "", fused.removesuffix(".weight").rpartition(".")[0])
    if place.endswith(".block_sparse_moe") and not recurrent:
        part = {other: word for word, other in MIXTRAL.items()}[part]
    return f"{place}.experts.{expert}.{part}.weight"


def _alike(name: str) -> str:
    """The same for all names that :func:`_apart` may give a projection, and its own."""
    found = re.fullmatch(r"(.+?)(?:\.experts\b.*)?\.(\d+)\.(\w+)", name)
    return f"{found[1]}.{found[2]}.{MIXTRAL.get(found[3], found[3])}" if found else ""
