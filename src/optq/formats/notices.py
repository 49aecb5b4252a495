"""What other programs make of experts and of a head: said before the work, while it can be changed.

Read in the source of transformers 5.23 and vLLM 0.33, not run in the latter. vLLM runs experts of
4 and 8 bits, symmetric. Its fast kernel takes groups of 32, 64 and 128 columns and whole rows, of
inputs that are a multiple of 128 wide; several GPUs share the columns of down projections, each
whole groups. What :mod:`optq.formats.readers` says of a checkpoint that is there is said from the
same rules: each begins with a verb, and its program stands before it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from optq.core.weight import UNCODED, LayerScheme
from optq.formats.compressed_tensors import COMPRESSED_TENSORS
from optq.formats.scheme import Format
from optq.model.experts import Bank, Copies
from optq.model.names import merges

GPUS = (1, 2, 4, 8)
GROUPS = (128, 64, 32)


def notices(
    form: Format,
    scheme: LayerScheme,
    model: Any,
    banks: list[Bank],
    dense: list[Bank],
    names: dict[str, str],
    head: bool = False,
) -> list[str]:
    """A line for each program that will not read, or not serve, these experts, or a packed head.

    ``banks`` are packed, ``dense`` are not; ``names`` are those on disk of the tensors of
    ``model``; ``head``: it is packed.
    """
    if scheme.wbits == UNCODED:  # nothing is packed
        return []
    refused = experts_in_transformers(form, scheme.sym, model, banks, dense, names)
    lines = [f"transformers {refused}"] if refused else []
    if banks and not for_optq_alone(model, banks, names):
        refused = experts_in_vllm(scheme)
        said = [refused] if refused else slow_in_vllm(scheme.groupsize, banks)
        lines += [f"vLLM {why}" for why in said]
    if head and (refused := head_in_transformers(form)):
        lines.append(f"transformers {refused}")
    return lines


def head_in_transformers(form: Format) -> str | None:
    """Why it does not read a packed head."""
    if form is COMPRESSED_TENSORS:
        return None  # optimum packs what is inside the blocks
    return "does not read a packed head from these files: compressed-tensors it does"


def experts_in_transformers(
    form: Format,
    sym: bool,
    model: Any,
    banks: list[Bank],
    dense: list[Bank],
    names: dict[str, str],
) -> str | None:
    """Why it does not read these files for the experts in them; None where it does."""
    if banks and _singly(form, model, banks, names):
        alone = for_optq_alone(model, banks, names)
        cause = "has the experts of this model in one tensor and reads none singly"
        return f"{cause}: these files are for {'OPTQ alone' if alone else 'vLLM and OPTQ'}"
    if banks and form is not COMPRESSED_TENSORS:
        return "does not read experts from these files: compressed-tensors it does"
    # It expects what it merges, or takes apart, to be packed.
    if form is COMPRESSED_TENSORS and any(_becomes_another(bank, model, names) for bank in dense):
        return "does not load these files: it wants no expert left dense (--skip)"
    if banks and not sym:
        return "reads experts from these files only if symmetric (--sym)"
    return None


def experts_in_vllm(scheme: LayerScheme) -> str | None:
    """Why it does not run experts of this scheme; None where it does."""
    if scheme.wbits in (4, 8) and scheme.sym and not scheme.actorder:
        return None
    ways = "--wbits 4 or 8", "--sym", "--static-groups"
    lacking = scheme.wbits not in (4, 8), not scheme.sym, scheme.actorder
    wanted = " ".join(way for way, lacks in zip(ways, lacking, strict=True) if lacks)
    return f"does not run such experts: it wants {wanted}"


def for_optq_alone(model: Any, banks: list[Bank], names: dict[str, str]) -> bool:
    """Whether these are experts whose single names no other program reads: GPT-OSS's."""
    parameters = banks[0].module.named_parameters(recurse=False)
    biased = any("bias" in name for name, _ in parameters)
    return biased and not merges(model, names[f"{banks[0].layers[0].name}.weight"])


def _singly(form: Format, model: Any, banks: list[Bank], names: dict[str, str]) -> bool:
    """Whether transformers would not know what single experts are called."""
    if form is COMPRESSED_TENSORS and isinstance(banks[0], Copies):  # it takes them apart
        return False
    return not merges(model, names[f"{banks[0].layers[0].name}.weight"])


def of_widths(form: Format, banks: list[Bank]) -> list[str]:
    """The same of experts that have widths of their own, when these are known."""
    widths = {layer.wbits for bank in banks for layer in bank.layers if layer.wbits}
    refused = widths_in_transformers(form, widths)
    lines = [f"transformers {refused}"] if refused else []
    if few := [str(wbits) for wbits in sorted(widths) if wbits not in (4, 8)]:
        lines.append(
            f"vLLM does not run experts of {' and '.join(few)} bits: a larger budget would"
        )
    return lines


def widths_in_transformers(form: Format, widths: Collection[int]) -> str | None:
    """Why it does not read experts of these widths: it asks for one group of all of them."""
    if form is not COMPRESSED_TENSORS or len(widths) < 2:
        return None
    return "reads experts from these files only if all have the same width"


def _becomes_another(bank: Bank, model: Any, names: dict[str, str]) -> bool:
    """Whether transformers makes other modules, or tensors, of an expert than are on disk."""
    first = bank.layers[0]
    if isinstance(bank, Copies):
        return True
    if f"{bank.name}.{first.attribute}" in names:
        return False
    on_disk = names.get(f"{first.name}.weight")
    return on_disk is None or merges(model, on_disk)


def slow_in_vllm(groupsize: int, banks: list[Bank]) -> list[str]:
    """What keeps vLLM's fast kernel from the experts."""
    hidden = {bank.inner[0][0].shape[1] for bank in banks}
    inside = {bank.down[0][0].shape[1] for bank in banks}
    slow = "runs these experts without its fast kernel"
    if odd := [width for width in hidden if width % 128]:
        return [f"{slow}: their {odd[0]} inputs are no multiple of 128"]
    if groupsize == -1:
        return []
    if groupsize not in GROUPS:
        return [f"{slow}: it takes --groupsize 32, 64, 128 or -1"]

    def most(size: int) -> int:
        return max((n for n in GPUS if not any(width % (n * size) for width in inside)), default=0)

    reached = most(groupsize)
    ways: list[tuple[int, int]] = []
    for size in GROUPS:
        if size < groupsize and (further := most(size)) > (ways[-1][1] if ways else reached):
            ways.append((size, further))
    if not ways:
        return []
    columns = " and ".join(map(str, sorted(inside)))
    offers = ", ".join(f"--groupsize {size} for {number}" for size, number in ways)
    return [
        f"can share these experts' {columns} columns in groups of {groupsize} among"
        f" {reached} GPU{'s' * (reached > 1)} at most: choose {offers}"
    ]
