"""Find a model's blocks and their layers, by shape and not by name.

The blocks are the members of the outermost ``nn.ModuleList`` of the decoder that holds the most
linear weights; the layers are the ``nn.Linear`` (and GPT-2's ``Conv1D``) inside. There is no
table of architectures. A model is refused, by name, where this could quantize half of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from optq.core.smoothquant import Smoothing
from optq.errors import ModelError, SettingError
from optq.model.experts import Bank, bank_of, count_of, is_bank
from optq.model.layer import Layer


@dataclass(eq=False)
class Block:
    """One decoder layer of the model; or its head, which comes last and gives no hidden state."""

    index: int
    name: str
    module: nn.Module
    layers: list[Layer] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)  # names of all, also of those skipped
    banks: list[Bank] = field(default_factory=list)  # of experts; their layers are among the others
    dense: list[Bank] = field(default_factory=list)  # those that are skipped
    head: bool = False


@dataclass(eq=False)
class Site:
    """One distinct input inside a block, with the layers that read it.

    Where experts are called together, all their inputs are one site: ``experts`` has the layers
    of each.
    """

    block: Block
    layers: list[Layer]
    place: int = 0  # in the order in which the block's sites are solved
    bank: Bank | None = None
    experts: list[list[Layer]] = field(default_factory=list)
    let_go: bool = False  # nobody has the original weights any more
    # Where activations are quantized: why they were not smoothed; else what was chosen, and the
    # scales of the columns, which the layers' weights are multiplied by before they are solved.
    unsmoothed: str | None = None
    smoothing: Smoothing | None = None
    scales: Tensor | None = None


def find_blocks(model: Any, skip: str | None = None, head: int | None = None) -> list[Block]:
    """The blocks of a language model in order, with all layers whose name ``skip`` does not match.

    With ``head``, the bits of its layer, the model's head is one more, the last
    (:func:`optq.model.head.with_own_head` has seen to it that it can be).
    Raises :class:`ModelError` where there are none, or where experts are in an unknown layout;
    ``SettingError`` where ``skip`` is no regular expression, or leaves a part of some experts.
    """
    from transformers.pytorch_utils import Conv1D

    linear = (nn.Linear, Conv1D)
    try:
        skipped = re.compile(skip) if skip else None
    except re.error as error:
        raise SettingError(
            f"--skip {skip} is not a regular expression: {error}", "escape it, or quote it"
        ) from error
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    name_of = {id(module): name for name, module in model.named_modules()}
    best, most, second = None, 0, 0
    inside: set[int] = set()  # members of a list already seen: lists inside blocks do not count
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside.update(id(child) for child in module.modules())
            weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, linear))
            if weights > most:
                best, most, second = module, weights, most
            else:
                second = max(second, weights)
    if best is None:
        raise ModelError(
            f"{type(model).__name__} has no blocks with linear layers",
            "give a decoder-only language model",
        )
    if second > most / 10:
        raise ModelError(
            f"{type(model).__name__} keeps the parts of its blocks in several lists",
            "give a model whose decoder layers are one list each",
        )
    blocks: list[Block] = []
    taken: set[int] = set()
    tried: list[Bank] = []
    for index, module in enumerate(best):
        prefix = name_of[id(best)] + f".{index}"
        block = Block(index, prefix, module)
        for name, child in module.named_modules(prefix=prefix):
            if id(child) in taken:  # a module shared between blocks belongs to the first
                continue
            if isinstance(child, linear):
                if _is_gate(child, name, module, prefix):
                    block.linears.append(name)
                    continue
                found = [Layer(name, child, isinstance(child, Conv1D))]
            elif is_bank(child):
                bank = bank_of(name, child)
                bank.check(tried)
                found = bank.layers
                block.banks.append(bank)
            else:
                _refuse_unknown(name, child, module)
                continue
            taken.add(id(child))
            block.linears += [layer.name for layer in found]
            kept = [x for x in found if skipped is None or not skipped.search(x.name)]
            if isinstance(child, linear) or len(kept) in (0, len(found)):
                block.layers += kept
                continue
            raise SettingError(
                f"--skip {skip} leaves some experts of {name} dense and others not",
                "skip all of them or none: no server loads such a block",
            )
        block.dense = [bank for bank in block.banks if bank.layers[0] not in block.layers]
        block.banks = [bank for bank in block.banks if bank not in block.dense]
        blocks.append(block)
    if skipped is not None and not any(
        skipped.search(name) for block in blocks for name in block.linears
    ):
        raise SettingError(
            f"--skip {skip} matches no layer", f"names are like {blocks[0].linears[0]}"
        )
    if not any(block.layers for block in blocks):
        raise ModelError(f"--skip {skip} leaves no layer to quantize", "choose a narrower one")
    if head is not None:
        module = model.get_output_embeddings()
        layer = Layer(name_of[id(module)], module, False, wbits=head)
        blocks.append(Block(len(blocks), layer.name, module, [layer], [layer.name], head=True))
    return blocks


def linears_outside(model: Any, blocks: list[Block]) -> list[str]:
    """The names of the ``nn.Linear`` that belong to no block: a head, projections, towers."""
    inside = {id(module) for block in blocks for module in block.module.modules()}
    named = model.named_modules()
    return [n for n, module in named if isinstance(module, nn.Linear) and id(module) not in inside]


def _is_gate(linear: Any, name: str, block: nn.Module, prefix: str) -> bool:
    """Whether a layer is small and decides for others: it stays dense.

    That is one beside experts with a number for each or one in all, or in a module beside them
    that ends in such a layer; and one that makes a number
    or two for each head, as many as the module has in a vector of its own (``in_proj_b`` and
    ``in_proj_a`` of gated delta nets): too few rows for servers' kernels, and nothing to save.
    """
    path = name[len(prefix) + 1 :].split(".")
    rows, columns = linear.weight.shape
    parent = block.get_submodule(".".join(path[:-1]))
    heads = {len(own) for own in parent.parameters(recurse=False) if own.ndim == 1}
    if rows <= columns / 8 and {rows, rows / 2} & heads:
        return True
    for depth, child in enumerate(path):
        above = block.get_submodule(".".join(path[:depth]))
        counts = {count_of(each) for each in above.children() if is_bank(each)}
        if not counts:
            continue
        if depth == len(path) - 1:
            return rows in {1, *counts}
        # A router in a module of its own ends in a number for each expert, and one for none.
        last = [m for m in above.get_submodule(child).modules() if isinstance(m, nn.Linear)][-1:]
        if last and last[0].weight.shape[0] in counts | {count + 1 for count in counts}:
            return True
    return False


def _refuse_unknown(name: str, module: nn.Module, block: nn.Module) -> None:
    """Refuse a module that keeps a good part of its block's weights where no layer is."""
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return
    weights = sum(parameter.numel() for parameter in block.parameters())
    sparse = any(is_bank(each) for each in block.modules())
    for own, parameter in module.named_parameters(recurse=False):
        stacked = sparse and sum(size > 1 for size in parameter.shape) > 2
        if stacked or (parameter.ndim >= 2 and parameter.numel() > weights / 10):
            shape = list(parameter.shape)
            raise ModelError(
                f"{name}.{own} holds weights {shape} of experts in an unknown layout",
                "choose another model: experts of this kind cannot be quantized yet",
            )
