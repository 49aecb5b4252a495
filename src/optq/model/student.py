"""A quantized model that learns from the full-precision one: by the scales of its layers.

What runs, forward and backward, are dense weights, made of the codes and of scales as the file will
keep them, and ``ds = sum_k dW_k (c_k - z)`` over the columns of a group: nothing is recorded of
the dequantization, and the gradient of one weight at a time is in memory. Blocks are checkpointed:
of a batch only what lies between them stays.

What the full-precision model predicts is not kept, but what its head reads: logits are made anew
for each batch, beside those of the quantized model, so that whatever a model does behind its head
is done to both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optq.core.grid import Storage
from optq.core.weight import QuantizedWeight
from optq.errors import ModelError
from optq.model.blocks import Block
from optq.model.experts import Bank
from optq.model.experts_call import called_through
from optq.model.layer import Layer
from optq.model.leaves import learning

TOKENS = 2048  # that run together, a sample at least: their logits are in memory
CHUNK = 256  # of them, whose predictions are in float32


class Divergence(torch.autograd.Function):
    """The sum over tokens of ``KL(full || quantized)`` of logits ``[tokens, vocabulary]``, in nats.

    Computed in float32 at least, some tokens at a time; the gradient, ``softmax(quantized) -
    softmax(full)``, is that of the sum: of a mean it would vanish in float16.
    """

    @staticmethod
    def forward(ctx: Any, quantized: Tensor, full: Tensor) -> Tensor:
        dtype = torch.promote_types(quantized.dtype, torch.float32)
        gradient = torch.empty_like(quantized) if ctx.needs_input_grad[0] else None
        total = quantized.new_zeros((), dtype=dtype)
        for first in range(0, len(full), CHUNK):
            some = slice(first, first + CHUNK)
            q, p = (each[some].to(dtype).log_softmax(-1) for each in (quantized, full))
            wanted = p.exp()
            total += (p.sub_(q).mul_(wanted)).sum()
            if gradient is not None:
                gradient[some] = q.exp_().sub_(wanted)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *up: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * up[0].to(gradient.dtype), None


@dataclass(frozen=True)
class Scales:
    """Those of one layer, with ``moved``, the logarithms of their factors, and the gradient of
    these, both ``[rows, groups]`` and parts of what Adam sees."""

    layer: Layer
    weight: QuantizedWeight  # as it was solved
    moved: Tensor
    gradient: Tensor

    def now(self, storage: Storage) -> Tensor:
        """As the file will keep them, float32."""
        start = self.weight.scales
        return storage.round(start * self.moved.exp().to(start.dtype))

    def put(self, storage: Storage) -> None:
        """Into the model, with the codes."""
        self.layer.put(replace(self.weight, scales=self.now(storage)).weight)

    def add(self, gradient: Tensor) -> None:
        """What the gradient ``[rows, columns]`` of the weight says of them."""
        weight, dtype = self.weight, self.moved.dtype
        units = weight.codes.to(dtype).sub_(weight.zeros.to(dtype)[:, weight.g_idx.long()])
        found = weight.by_group(units.mul_(gradient))
        self.gradient.add_(found.mul_(weight.scales).mul_(self.moved.exp()))


class Student:
    """``model``, with its original weights until :meth:`put`; its layers are then ``weights``."""

    def __init__(
        self, model: Any, blocks: list[Block], weights: Mapping[Layer, QuantizedWeight]
    ) -> None:
        self.model, self.blocks = model, blocks
        self.head: nn.Module | None = model.get_output_embeddings()
        if self.head is None:
            raise ModelError(
                f"{type(model).__name__} has no head whose predictions could be compared",
                "leave --tune model out",
            )
        shapes = [weight.scales.shape for weight in weights.values()]
        sizes = [shape.numel() for shape in shapes]
        # A head that is quantized too: what it was makes the predictions that are aimed at.
        own = any(layer.module is self.head for layer in weights)
        self.full_head = deepcopy(self.head) if own else self.head
        dtype, device = torch.promote_types(model.dtype, torch.float32), model.device
        self.moved = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self.moved.grad = self.slope = torch.zeros_like(self.moved)
        parts = zip(
            weights.items(),
            shapes,
            self.moved.split(sizes),
            self.slope.split(sizes),
            strict=True,
        )
        self.layers = [
            Scales(layer, weight.to(device), moved.view(shape), gradient.view(shape))
            for (layer, weight), shape, moved, gradient in parts
        ]

    def put(self, storage: Storage) -> None:
        for scales in self.layers:
            scales.put(storage)

    def hidden(self, tokens: Tensor) -> list[Tensor]:
        """What the head reads of each sample of ``tokens``, on the CPU."""
        found: list[Tensor] = []
        assert self.head is not None
        handle = self.head.register_forward_pre_hook(lambda _, args: found.extend(args[0].cpu()))
        try:
            with torch.no_grad():
                for some in tokens.split(self.at_once(tokens)):
                    self._logits(some)
        finally:
            handle.remove()
        return found

    def divergence(self, tokens: Tensor, wanted: list[Tensor], learn: bool = False) -> float:
        """The mean over tokens, in nats, from what the head would make of ``wanted``.

        ``learn``: the gradient of the sum goes to :attr:`moved`.
        """
        total = 0.0
        for first in range(0, len(tokens), self.at_once(tokens)):
            some = slice(first, first + self.at_once(tokens))
            beside = torch.stack(wanted[some]).to(self.model.device)
            with torch.set_grad_enabled(learn), self._beside(beside):
                quantized, full = self._logits(tokens[some]).flatten(0, 1).chunk(2)
                loss = Divergence.apply(quantized, full.detach())
            del quantized, full  # whose memory the way back needs
            if learn:
                loss.backward()
            total += loss.item()
        return total / tokens.numel()

    @staticmethod
    def at_once(tokens: Tensor) -> int:
        return max(1, TOKENS // tokens.shape[1])

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits

    @contextmanager
    def _beside(self, hidden: Tensor) -> Iterator[None]:
        """Behind the predictions stand those of the full-precision model, from ``hidden``."""
        assert self.head is not None and self.full_head is not None

        def both(_: nn.Module, args: Any, logits: Tensor) -> Tensor:
            with torch.no_grad():
                full = self.full_head.forward(hidden)
            return torch.cat([logits, full])

        handle = self.head.register_forward_hook(both)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, a backward pass adds to the gradient of :attr:`moved`, and to no other."""
        banks = [bank for block in self.blocks for bank in block.banks]
        of = {scales.layer: scales for scales in self.layers}
        with ExitStack() as undo:
            take = learning(self.model, of, banks, lambda layer, got: of[layer].add(got))
            undo.enter_context(take)
            undo.enter_context(called_through(banks, Bank.call))
            undo.enter_context(_checkpointed({x.module for x in self.blocks} - {self.head}))
            yield


@contextmanager
def _checkpointed(modules: Collection[nn.Module]) -> Iterator[None]:
    """Inside, they keep nothing for the backward pass but what they were called with."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for module in modules:
        module.forward = partial(again, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
