"""What other programs make of experts and of a head: said before the work, while it can be changed.

Read in the source of transformers 5.23 and vLLM 0.33, not run in the latter. vLLM runs experts of
4 and 8 bits, symmetric. Its fast kernel takes groups of 32, 64 and 128 columns and whole rows, of
inputs that are a multiple of 128 wide; several GPUs share the columns of down projections, each
whole groups.
"""

from __future__ import annotations

from typing import Any

from optq.core.weight import LayerScheme
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
    lines = _of_experts(form, scheme, model, banks, dense, names)
    if head and form is not COMPRESSED_TENSORS:  # optimum packs what is inside the blocks
        line = "transformers does not read a packed head from these files: compressed-tensors it"
        lines.append(f"{line} does")
    return lines


def _of_experts(
    form: Format,
    scheme: LayerScheme,
    model: Any,
    banks: list[Bank],
    dense: list[Bank],
    names: dict[str, str],
) -> list[str]:
    lines = []
    # It expects what it merges, or takes apart, to be packed.
    if form is COMPRESSED_TENSORS and any(_becomes_another(bank, model, names) for bank in dense):
        lines = ["transformers does not load these files: it wants no expert left dense (--skip)"]
    if not banks:
        return lines
    apart = form is COMPRESSED_TENSORS and isinstance(banks[0], Copies)
    if not apart and not merges(model, names[f"{banks[0].layers[0].name}.weight"]):
        cause = "transformers has the experts of this model in one tensor and reads none singly"
        parameters = banks[0].module.named_parameters(recurse=False)
        if any("bias" in name for name, _ in parameters):  # GPT-OSS, and vLLM's loader of it
            return [f"{cause}: these files are for OPTQ alone"]
        lines = [f"{cause}: these files are for vLLM and OPTQ"]
    elif form is not COMPRESSED_TENSORS:
        lines = ["transformers does not read experts from these files: compressed-tensors it does"]
    elif not scheme.sym and not lines:
        lines = ["transformers reads experts from these files only if symmetric (--sym)"]
    if scheme.wbits not in (4, 8) or not scheme.sym or scheme.actorder:
        ways = "--wbits 4 or 8", "--sym", "--static-groups"
        lacking = scheme.wbits not in (4, 8), not scheme.sym, scheme.actorder
        wanted = " ".join(way for way, lacks in zip(ways, lacking, strict=True) if lacks)
        return [*lines, f"vLLM does not run such experts: it wants {wanted}"]
    return [*lines, *_kernel(scheme.groupsize, banks)]


def of_widths(form: Format, banks: list[Bank]) -> list[str]:
    """The same of experts that have widths of their own, when these are known."""
    widths = sorted({layer.wbits for bank in banks for layer in bank.layers if layer.wbits})
    lines = []
    if form is COMPRESSED_TENSORS and len(widths) > 1:  # it asks for one group of all of them
        lines = ["transformers reads experts from these files only if all have the same width"]
    if few := [str(wbits) for wbits in widths if wbits not in (4, 8)]:
        lines.append(
            f"vLLM does not run experts of {' and '.join(few)} bits: a larger budget would"
        )
    return lines


def _becomes_another(bank: Bank, model: Any, names: dict[str, str]) -> bool:
    """Whether transformers makes other modules, or tensors, of an expert than are on disk."""
    first = bank.layers[0]
    if isinstance(bank, Copies):
        return True
    if f"{bank.name}.{first.attribute}" in names:
        return False
    on_disk = names.get(f"{first.name}.weight")
    return on_disk is None or merges(model, on_disk)


def _kernel(groupsize: int, banks: list[Bank]) -> list[str]:
    """What keeps vLLM's fast kernel from the experts."""
    hidden = {bank.inner[0][0].shape[1] for bank in banks}
    inside = {bank.down[0][0].shape[1] for bank in banks}
    slow = "vLLM runs these experts without its fast kernel"
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
        f"vLLM can share these experts' {columns} columns in groups of {groupsize} among"
        f" {reached} GPU{'s' * (reached > 1)} at most: choose {offers}"
    ]
