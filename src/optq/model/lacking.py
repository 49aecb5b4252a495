"""Whether tensors on disk are those of the model: what lacks, and which expert is wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from optq.model.experts import bank_of, is_bank
from optq.model.names import disk_names, expert_name, renaming


def lacking(
    model: Any, names_on_disk: Collection[str], found: Mapping[str, str] | None = None
) -> list[str]:
    """The names on disk of tensors that the model would be loaded without, in order.

    Each projection of an expert counts, where the disk does not have all of them in one tensor.
    What transformers ties, or makes itself where it is missing, is not lacking. ``found``: what
    :func:`disk_names` found, if that is known.
    """
    found = disk_names(model, names_on_disk) if found is None else found
    there = {name for name, place in found.items() if place in names_on_disk}
    wanted = {*model.state_dict()}
    for name, module in model.named_modules():
        for layer in bank_of(name, module).layers if is_bank(module) else ():
            fused = f"{name}.{layer.attribute}"
            if fused not in there:
                wanted.discard(fused)
                wanted.add(f"{layer.name}.weight")
    rename, converters = renaming(model)
    for on_disk in {*names_on_disk} - {*found.values()}:
        in_model, pattern = rename(on_disk)
        there.add(in_model)
        for each in converters:
            if pattern in each.source_patterns:
                first, *others = each.target_patterns
                there |= {in_model.replace(first, other) for other in others}
    for pair in model.all_tied_weights_keys.items():
        if there & {*pair}:
            there |= {*pair}
    made = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = {n for n in wanted - there if not any(each.search(n) for each in made)}
    return sorted(_called(name, found) for name in missing)


def wrong_expert(model: Any, layout: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a projection of an expert, where the disk has each on its own.

    It lacks, though others of its block are there; it has another shape; or the model has no such
    expert.
    """
    found = disk_names(model, layout)
    banks = {name: bank_of(name, m) for name, m in model.named_modules() if is_bank(m)}
    for bank in banks.values():
        places = {layer: found.get(f"{layer.name}.weight", "") for layer in bank.layers}
        some = any(place in layout for place in places.values())
        for layer, place in places.items() if some else ():
            if place not in layout:
                return f"{_called(f'{layer.name}.weight', found)} is missing"
            if layout[place].shape != layer.shape:
                return misshapen(place, layout[place].shape, layer.shape)
    rename, converters = renaming(model)
    for name in sorted({*layout} - {*found.values()}):
        merged, pattern = rename(name)
        of_bank = pattern and merged.rpartition(".")[0] in banks
        if of_bank and expert_name(merged, str(pattern), converters, name):
            return f"{name} is of an expert that the model does not have"
    return None


def misshapen(name: str, found: Collection[int], wanted: Collection[int]) -> str:
    """That a tensor has another shape than the model's."""
    one, other = (" x ".join(map(str, shape)) for shape in (found, wanted))
    return f"{name} is {one} where the model has {other}"


def _called(name: str, found: Mapping[str, str]) -> str:
    """What a tensor of the model would be called on disk, by what its likes are called there."""
    number = re.compile(r"(?<=\.)\d+(?=\.)")
    own, kind = iter(number.findall(name)), number.sub("", name)
    for like, place in found.items():
        if number.sub("", like) == kind and number.findall(like) == number.findall(place):
            return number.sub(lambda _: next(own), place)
    return name
