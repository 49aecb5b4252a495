"""Experts that a block keeps in one parameter for each projection, ``[experts, ..]``.

transformers calls no module for an expert, so hooks see none. For the time of a run the experts'
classes dispatch to a function of ours instead (``ExpertsInterface``), which computes what their own
eager code does, stage by stage for all experts: what gate and up read is handed over, and then what
down reads. The layout is in the flags that ``use_experts_implementation`` leaves on each instance;
that the two agree to the bit is tried on a small one of the same class before any work.

Classes that have no flags are reached where what they compute is that of :class:`Copies`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from inspect import signature
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
SEVERAL = 31  # experts of it that have weights of their own; the others have theirs again
Routed = dict[int, tuple[Tensor, Tensor]]  # by expert: places among the top k, and tokens


def is_bank(module: nn.Module) -> bool:
    """Whether a module is experts of a known layout."""
    return all(hasattr(module, flag) for flag in FLAGS) or _reads_copies(module)


def bank_of(name: str, module: nn.Module) -> Bank:
    """The experts of a module for which :func:`is_bank` holds."""
    return Bank(name, module) if all(hasattr(module, f) for f in FLAGS) else Copies(name, module)


def count_of(module: Any) -> int:
    """How many experts a module has for which :func:`is_bank` holds."""
    return len(module.down_proj)


def _reads_copies(module: nn.Module) -> bool:
    """Whether a module's parameters and its one input are those of :class:`Copies`."""
    shapes = {name: [*p.shape] for name, p in module.named_parameters(recurse=False)}
    if shapes.keys() != {"gate_up_proj", "down_proj"} or len(shapes["down_proj"]) != 3:
        return False
    count, inside, hidden = shapes["down_proj"]
    inputs = signature(type(module).forward).parameters  # with self
    return shapes["gate_up_proj"] == [count, hidden, 2 * inside] and len(inputs) == 2


def own_forward(module: Any) -> Callable[..., Tensor]:
    """The eager code of a class of experts, without transformers' dispatch."""
    forward: Callable[..., Tensor] = type(module).forward
    return getattr(forward, "__wrapped__", forward)


class Bank:
    """The experts of one module called ``name``; ``inner`` and ``down`` are their layers."""

    packed = False  # then the module multiplies: see :class:`optq.model.linear.QuantizedExperts`

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.has_gate, self.has_bias, self.transposed, self.concatenated, self.normed = (
            self._flags()
        )
        self.first = "gate_up_proj" if self.has_gate else "up_proj"
        parts, count = PARTS[self.first], len(getattr(module, self.first))
        rows = getattr(module, self.first).shape[2 if self.transposed else 1] // len(parts)

        def layer(expert: int, attribute: str, part: str, taken: slice | None) -> Layer:
            title = f"{name}.{expert}.{part}"
            return Layer(title, module, self.transposed, attribute, expert, taken)

        halves = [slice(i * rows, (i + 1) * rows) for i in range(len(parts))]
        if not self.concatenated:
            halves = [slice(i, None, len(parts)) for i in range(len(parts))]
        self.inner = [
            [layer(e, self.first, *part) for part in zip(parts, halves, strict=True)]
            for e in range(count)
        ]
        self.down = [[layer(e, "down_proj", "down_proj", None)] for e in range(count)]
        self.summed = ""  # whose dtype outputs are summed in: see :meth:`check`
        # Each expert's slice as a tensor of its own, where each is to have its own gradient.
        self.slices: dict[str, list[Tensor]] = {}

    def _flags(self) -> Iterator[bool]:
        return (getattr(self.module, flag) for flag in FLAGS)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What banks have in common that compute the same with other weights."""
        shapes = [layer.shape for layer in (*self.inner[0], *self.down[0])]
        return type(self.module), *self._flags(), len(self.inner), *shapes

    @property
    def layers(self) -> list[Layer]:
        """All of them, expert by expert."""
        pairs = zip(self.inner, self.down, strict=True)
        return [layer for inner, down in pairs for layer in (*inner, *down)]

    def routed(self, index: Tensor) -> Routed:
        """The tokens of each expert that has any, in the order of the model's own code."""
        count, flat = len(self.inner), index.T.reshape(-1)  # all first places come first
        order, counts = flat.argsort(stable=True), flat.bincount(minlength=count).tolist()
        hit = enumerate(zip(order.split(counts), counts, strict=True))
        tokens = len(index)
        return {e: (own // tokens, own % tokens) for e, (own, some) in hit if some and e < count}

    def routing(self, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token goes to, and with what weights, both ``[tokens, top k]``."""
        index, weights = given
        return index.masked_fill(weights == 0, len(self.inner)), weights  # to no expert

    def call(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What the module computes."""
        routed = self.routed(index)
        return self.combine(x, routed, self.inside(x, routed), weights)

    def every(self, x: Tensor) -> Tensor:
        """What the experts read, a row for each token: ``[tokens, hidden]``."""
        return x

    def read(self, x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        """What an expert's gate and up read of ``x`` for these tokens."""
        return x[tokens.to(x.device)]

    def inside(self, x: Tensor, routed: Routed) -> dict[int, Tensor]:
        """What each expert's down projection reads."""
        return {e: self.activations(e, self.read(x, e, own)) for e, (_, own) in routed.items()}

    def activations(self, expert: int, x: Tensor) -> Tensor:
        """What an expert's down projection reads for inputs ``[tokens, hidden]``."""
        return self._activate(self._product(self.first, expert, x))

    def _activate(self, inside: Tensor) -> Tensor:
        return self.module._apply_gate(inside) if self.has_gate else self.module.act_fn(inside)

    def combine(
        self, like: Tensor, routed: Routed, inside: dict[int, Tensor], weights: Tensor
    ) -> Tensor:
        """The output ``[tokens, hidden]`` of all experts, from what their down projections read."""
        dtypes = {"weights": weights.dtype, "float32": torch.float32}
        total = torch.zeros_like(like, dtype=dtypes.get(self.summed, like.dtype))
        for expert, (places, tokens) in routed.items():
            out = self._product("down_proj", expert, inside[expert])
            if self.normed:
                out = self.module.post_expert_norm(out)
            out = out * weights[tokens, places, None]
            total.index_add_(0, tokens, out.to(total.dtype))
        return total.to(like.dtype)

    def check(self, tried: list[Bank] | None = None) -> None:
        """Refuse experts whose own code computes something else; find the dtype of its sums.

        ``tried`` are banks that were tried before: another one like them is not. Raises
        :class:`ModelError`.
        """
        for other in tried or []:
            if self.kind == other.kind:
                self.summed = other.summed
                return
        cause = f"the experts {self.name} compute more than their layout says"
        remedy = "report this model: its experts cannot be quantized yet"
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), torch.device("cpu"), library(ModelError, cause, remedy):
            probe = type(self)(self.name, self._small(generator))
            x, *given = probe._trial(generator)
            expected = own_forward(self.module)(probe.module, x, *given)
            index, weights = probe.routing(x, *given)
            routed = probe.routed(index)
            inside = probe.inside(x, routed)
            for self.summed in ("x", "float32", "weights"):
                probe.summed = self.summed
                if torch.equal(probe.combine(x, routed, inside, weights), expected):
                    if tried is not None:
                        tried.append(self)
                    return
        raise ModelError(cause, remedy)

    def _small(self, generator: torch.Generator) -> Any:
        """A module of the same class with few activations; on the CPU, of a skeleton as well."""
        inside = SMALL * len(self.inner[0])
        (rows, _), (_, columns) = self.down[0][0].shape, self.inner[0][0].shape
        shapes = {self.first: [inside, columns], "down_proj": [rows, SMALL]}
        if self.transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        shapes |= {f"{self.first}_bias": [inside], "down_proj_bias": [rows]}
        small, own = copy(self.module), torch.arange(len(self.inner)) % SEVERAL
        small.__dict__["_parameters"] = {
            name: _random(generator, min(len(own), SEVERAL), *shape).bfloat16()[own]
            for name, shape in shapes.items()
        }
        if self.normed:  # its values may still be on disk
            norm = deepcopy(self.module.post_expert_norm).to_empty(device="cpu").bfloat16()
            for parameter in norm.parameters():
                parameter.data.normal_(generator=generator)
            small.__dict__["_modules"] = {**self.module._modules, "post_expert_norm": norm}
        return small

    def _trial(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Inputs of the trial."""
        count, columns = len(self.inner), self.inner[0][0].shape[1]
        x, weights = _random(generator, 9, columns).bfloat16(), _random(generator, 9, 2).half()
        return x, torch.randint(count, (9, 2), generator=generator), weights

    def _product(self, attribute: str, expert: int, x: Tensor) -> Tensor:
        bias = getattr(self.module, f"{attribute}_bias")[expert] if self.has_bias else None
        if self.packed:
            return self.module.product(attribute, expert, x, bias)
        weight = (self.slices.get(attribute) or getattr(self.module, attribute))[expert]
        if not self.transposed:
            return linear(x, weight, bias)
        return x @ weight if bias is None else x @ weight + bias


class Copies(Bank):
    """Experts that multiply, all at once, a copy of the tokens for each: Llama 4's.

    They read ``[experts * tokens, hidden]``. In each copy the tokens that go to other experts are
    zero, and the rest have been scaled by their scores: a row of zeros is no token. The weights are
    ``[experts, hidden, 2 I]``, gate beside up, and ``[experts, I, hidden]``.
    """

    def _flags(self) -> Iterator[bool]:
        return iter((True, False, True, True, False))

    def routing(self, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """As of a model that asks for all experts, and names none where a token is not routed."""
        mask = self._apart(x).ne(0).any(-1).T
        experts = torch.arange(len(self.inner), device=x.device)
        return torch.where(mask, experts, len(experts)), mask.to(x.dtype)

    def every(self, x: Tensor) -> Tensor:
        return self._apart(x).sum(0)  # a token's copies differ by a factor, most of them zero

    def read(self, x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        return self._apart(x)[expert, tokens.to(x.device)]

    def inside(self, x: Tensor, routed: Routed) -> dict[int, Tensor]:
        if self.packed or self.slices:
            return super().inside(x, routed)
        # The bits of a row depend on how many are multiplied with it: all, as its own code does.
        inside = self._activate(torch.bmm(self._apart(x), self.module.gate_up_proj))
        return {expert: inside[expert, tokens] for expert, (_, tokens) in routed.items()}

    def combine(
        self, like: Tensor, routed: Routed, inside: dict[int, Tensor], weights: Tensor
    ) -> Tensor:
        """The outputs, each in the place of its copy."""
        if self.packed or self.slices:
            total = torch.zeros_like(self._apart(like))
            for expert, (_, tokens) in routed.items():
                total[expert, tokens] = self._product("down_proj", expert, inside[expert])
            return total.view_as(like)
        down = self.module.down_proj
        copies = like.new_zeros(len(down), len(weights), down.shape[1])
        for expert, (_, tokens) in routed.items():
            copies[expert, tokens] = inside[expert]
        return torch.bmm(copies, down).view_as(like)

    def _activate(self, inside: Tensor) -> Tensor:
        gate, up = inside.chunk(2, dim=-1)
        return up * self.module.act_fn(gate)

    def _apart(self, x: Tensor) -> Tensor:
        """``[experts, tokens, hidden]``."""
        return x.view(len(self.inner), -1, x.shape[-1])

    def _trial(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        x = _random(generator, len(self.inner), 9, self.inner[0][0].shape[1]).bfloat16()
        x[torch.rand(x.shape[:2], generator=generator) < 0.5] = 0
        return (x.flatten(0, 1),)


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
