"""Experts that a block keeps in one parameter for each projection, ``[experts, ..]``.

transformers calls no module for an expert, so hooks see none. For the time of a run the experts'
classes dispatch to a function of ours instead (``ExpertsInterface``), which computes what their own
eager code does, stage by stage for all experts: what gate and up read is handed over, and then what
down reads. The layout is in the flags that ``use_experts_implementation`` leaves on each instance;
that the two agree to the bit is tried on a small one of the same class before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from optq.boundary import library
from optq.errors import ModelError
from optq.model.layer import Layer

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",)}
SMALL = 8  # activations of an expert in the trial of a layout
OURS = "optq"  # among transformers' experts implementations
Routed = dict[int, tuple[Tensor, Tensor]]  # by expert: places among the top k, and tokens


def is_bank(module: nn.Module) -> bool:
    """Whether a module is experts of a known layout."""
    return all(hasattr(module, flag) for flag in FLAGS)


def own_forward(module: Any) -> Callable[..., Tensor]:
    """The eager code of a class of experts, without transformers' dispatch."""
    forward: Callable[..., Tensor] = type(module).forward.__wrapped__
    return forward


class Bank:
    """The experts of one module called ``name``; ``inner`` and ``down`` are their layers."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.first = "gate_up_proj" if module.has_gate else "up_proj"
        parts, count = PARTS[self.first], len(getattr(module, self.first))
        rows = getattr(module, self.first).shape[2 if module.is_transposed else 1] // len(parts)

        def layer(expert: int, attribute: str, part: str, taken: slice | None) -> Layer:
            title = f"{name}.{expert}.{part}"
            return Layer(title, module, module.is_transposed, attribute, expert, taken)

        halves = [slice(i * rows, (i + 1) * rows) for i in range(len(parts))]
        if not module.is_concatenated:
            halves = [slice(i, None, len(parts)) for i in range(len(parts))]
        self.inner = [
            [layer(e, self.first, *part) for part in zip(parts, halves, strict=True)]
            for e in range(count)
        ]
        self.down = [[layer(e, "down_proj", "down_proj", None)] for e in range(count)]
        self.summed = ""  # whose dtype outputs are summed in: see :meth:`check`

    @property
    def layers(self) -> list[Layer]:
        """All of them, expert by expert."""
        pairs = zip(self.inner, self.down, strict=True)
        return [layer for inner, down in pairs for layer in (*inner, *down)]

    def routed(self, index: Tensor) -> Routed:
        """The tokens of each expert that has any, in the order of the model's own code."""
        mask = torch.nn.functional.one_hot(index, num_classes=len(self.inner) + 1).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist()
        where = {expert: torch.where(mask[expert]) for expert in hit if expert < len(self.inner)}
        return {expert: (places, tokens) for expert, (places, tokens) in where.items()}

    def activations(self, expert: int, x: Tensor) -> Tensor:
        """What an expert's down projection reads for inputs ``[tokens, hidden]``."""
        inside = self._product(self.first, expert, x)
        return (
            self.module._apply_gate(inside) if self.module.has_gate else self.module.act_fn(inside)
        )

    def combine(
        self, like: Tensor, routed: Routed, inside: dict[int, Tensor], weights: Tensor
    ) -> Tensor:
        """The output ``[tokens, hidden]`` of all experts, from what their down projections read."""
        dtypes = {"weights": weights.dtype, "float32": torch.float32}
        total = torch.zeros_like(like, dtype=dtypes.get(self.summed, like.dtype))
        for expert, (places, tokens) in routed.items():
            out = self._product("down_proj", expert, inside[expert])
            if self.module.has_post_expert_norm:
                out = self.module.post_expert_norm(out)
            out = out * weights[tokens, places, None]
            total.index_add_(0, tokens, out.to(total.dtype))
        return total.to(like.dtype)

    def check(self) -> None:
        """Refuse experts whose own code computes something else; find the dtype of its sums.

        Raises :class:`ModelError`.
        """
        inside = SMALL * len(self.inner[0])
        (rows, _), (_, columns) = self.down[0][0].shape, self.inner[0][0].shape
        shapes = {self.first: [inside, columns], "down_proj": [rows, SMALL]}
        if self.module.is_transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        shapes |= {f"{self.first}_bias": [inside], "down_proj_bias": [rows]}
        count, generator = len(self.inner), torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:  # on the CPU, also while a skeleton is made
            return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

        small = copy(self.module)
        small.__dict__["_parameters"] = {
            name: random(count, *shape).bfloat16() for name, shape in shapes.items()
        }
        if self.module.has_post_expert_norm:  # whose values may still be on disk
            norm = deepcopy(self.module.post_expert_norm).to_empty(device="cpu").bfloat16()
            for parameter in norm.parameters():
                parameter.data.normal_(generator=generator)
            small.__dict__["_modules"] = {**self.module._modules, "post_expert_norm": norm}
        probe = Bank(self.name, small)
        x, weights = random(9, columns).bfloat16(), random(9, 2).half()
        index = torch.randint(count, (9, 2), generator=generator, device="cpu")
        cause = f"the experts {self.name} compute more than their layout says"
        remedy = "report this model: its experts cannot be quantized yet"
        with torch.no_grad(), torch.device("cpu"), library(ModelError, cause, remedy):
            expected = own_forward(self.module)(small, x, index, weights)
            routed = self.routed(index)
            read = {e: probe.activations(e, x[tokens]) for e, (_, tokens) in routed.items()}
            for self.summed in ("x", "float32", "weights"):
                probe.summed = self.summed
                if torch.equal(probe.combine(x, routed, read, weights), expected):
                    return
        raise ModelError(cause, remedy)

    def _product(self, attribute: str, expert: int, x: Tensor) -> Tensor:
        bias = getattr(self.module, f"{attribute}_bias")[expert] if self.module.has_bias else None
        if isinstance(self.module, QuantizedExperts):
            return self.module.product(attribute, expert, x, bias)
        weight = getattr(self.module, attribute)[expert]
        if not self.module.is_transposed:
            return linear(x, weight, bias)
        return x @ weight if bias is None else x @ weight + bias


class QuantizedExperts(nn.Module):
    """What experts become whose layers are modules of their own, packed: see :func:`open_bank`."""

    bank: Bank

    def forward(self, x: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Only experts that were chosen are multiplied."""
        index, weights = (*routing, *named.values())
        routed = self.bank.routed(index)
        inside = {e: self.bank.activations(e, x[tokens]) for e, (_, tokens) in routed.items()}
        return self.bank.combine(x, routed, inside, weights)

    def product(self, attribute: str, expert: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """One projection: of gate and up together as the experts' own code has them."""
        own = self.get_submodule(str(expert))
        parts = [own.get_submodule(part)(x) for part in PARTS.get(attribute, (attribute,))]
        if self.is_concatenated or len(parts) == 1:
            y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        else:
            y = torch.stack(parts, dim=-1).flatten(-2)
        return y if bias is None else y + bias


def open_bank(module: Any) -> None:
    """Turn experts in one parameter into modules ``EXPERT.PROJECTION``, empty, in place."""
    bank = Bank(type(module).__name__, module)
    bank.check()
    layers = [(layer.name.split(".")[-2:], layer.shape) for layer in bank.layers]
    for attribute in (bank.first, "down_proj"):
        delattr(module, attribute)
        setattr(module, attribute, torch.empty(0))  # for models that initialise by name
    for (expert, part), (rows, columns) in layers:
        if not hasattr(module, expert):
            module.add_module(expert, nn.Module())
        with torch.device("meta"):
            empty = nn.Linear(columns, rows, bias=False)
        module.get_submodule(expert).add_module(part, empty)
    module.bank = bank
    module.__class__ = type(type(module).__name__, (QuantizedExperts, type(module)), {})


@contextmanager
def called_through(
    banks: Sequence[Bank], function: Callable[[Bank, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Inside, ``function`` is called for a bank in the place of its module's own forward."""
    if not banks:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    bank_of = {id(bank.module): bank for bank in banks}

    def ours(module: nn.Module, x: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        bank = bank_of.get(id(module))
        if bank is None:  # left dense
            return own_forward(module)(module, x, *routing, **named)
        return function(bank, x, *routing, *named.values())

    configs = {id(bank.module.config): bank.module.config for bank in banks}.values()
    before = [(config, config._experts_implementation) for config in configs]
    ALL_EXPERTS_FUNCTIONS[OURS] = ours
    try:
        for config in configs:
            config._experts_implementation = OURS
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
        del ALL_EXPERTS_FUNCTIONS[OURS]
