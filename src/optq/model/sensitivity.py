"""How much a model's predictions feel errors, of each row of its layers, of a block: by gradients.

With labels drawn from the model's own predictions, the gradient ``G`` of their log-likelihood with
respect to a weight gives the Fisher information: to second order the divergence of the predictions
is ``E <G, dW>^2 / 2``. ``G`` is a sum over tokens of ``g_t x_t^T``. Where a row's ``g_t`` at
different tokens have nothing to do with each other, nor with those of other rows, that is
``sum_r E[g_r^2] (dW H dW^T)_rr / 2`` a token, and ``E |G_r|^2 = tokens E[g_r^2] tr H``: so

    |G_r|^2 / (2 tokens tr H)

is what one unit of the row's error costs, in nats a token. Gradients of weights serve for any kind
of layer, and weigh a token as its input weighs in ``H``. (docs/log.md has them beside a probe that
quantizes one block at a time and measures the divergence.)

A backward pass needs what the forward made. Here only what goes into each block is kept: a block
comes once for the forward, and once more for the backward, which runs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from optq.errors import NumericsError, not_finite_remedy
from optq.model.batch import handed_on
from optq.model.blocks import Block
from optq.model.experts import Bank
from optq.model.experts_call import called_through
from optq.model.layer import Layer
from optq.model.shards import Place, Shards, places

SAMPLES, LENGTH, AT_ONCE = 16, 512, 1024  # of samples their first tokens, so many at a time


def some_of(tokens: Tensor) -> Sequence[Tensor]:
    """Of the calibration text what gradients are taken on."""
    few = tokens[:SAMPLES, :LENGTH]
    return few.split(max(1, AT_ONCE // few.shape[1]))


def gradients(
    model: Any,
    blocks: Sequence[Block],
    shards: Shards,
    batches: Sequence[Tensor],
    device: torch.device,
) -> dict[Layer, Float[Tensor, " rows"]]:
    """``|G_r|^2 / (2 tokens)`` of each row of each layer, float32 on the CPU.

    ``batches`` are token ids ``[samples, tokens]``. Layers that no token reached are left out. The
    same batches give the same labels. Raises ``NumericsError`` where a gradient is not finite.
    """
    passing = _Passing(model, blocks, shards, device)
    passing.weights = True
    tokens = passing.run(batches)
    return {layer: squares / (2 * tokens) for layer, squares in passing.squares.items()}


def metrics(
    model: Any,
    blocks: Sequence[Block],
    shards: Shards,
    batches: Sequence[Tensor],
    device: torch.device,
) -> list[Float[Tensor, "hidden hidden"]]:
    """``E g g^T / 2`` of what each block hands on, float32 on the CPU, with ``g`` as above.

    An error ``e [hidden]`` of a token there makes the predictions diverge by ``e E[g g^T] e / 2``,
    in nats, as far as errors at different tokens have nothing to do with each other. Raises as
    :func:`gradients` does.
    """
    passing = _Passing(model, blocks, shards, device)
    tokens = passing.run(batches)
    return [passing.outer[block].div_(2 * tokens) for block in blocks]


class _Passing:
    """Blocks that come as they are called, one at a time."""

    def __init__(
        self, model: Any, blocks: Sequence[Block], shards: Shards, device: torch.device
    ) -> None:
        self.model, self.blocks, self.shards, self.device = model, blocks, shards, device
        self.here: Block | None = None
        self.weights = False  # whether their gradients are asked for, or those between blocks
        self.squares: dict[Layer, Tensor] = {}
        self.outer: dict[Block, Tensor] = {}
        # Between the two passes the graph has the parameters themselves, without their values.
        self._gone: dict[Place, nn.Parameter] = {}

    def run(self, batches: Sequence[Tensor]) -> int:
        """There and back with all ``batches``; the number of their tokens."""
        generator = torch.Generator().manual_seed(0)
        with self.called():
            for ids in batches:
                ids = ids.to(self.device)
                logits = self.model(input_ids=ids, use_cache=False).logits.flatten(0, -2).float()
                chances = logits.detach().softmax(-1).cpu()
                if not torch.isfinite(chances).all():
                    raise NumericsError(
                        "the model's logits are not finite", not_finite_remedy(self.model.dtype)
                    )
                labels = torch.multinomial(chances, 1, generator=generator).flatten()
                cross_entropy(logits, labels.to(self.device), reduction="sum").backward()
                self.leave()
        return sum(ids.numel() for ids in batches)

    @contextmanager
    def called(self) -> Iterator[None]:
        """Inside, the model fetches its blocks itself, and its backward pass runs them again."""
        self.model.requires_grad_(False)
        inside = {id(m) for block in self.blocks for m in block.module.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                for tensor in (*module.parameters(False), *module.buffers(False)):
                    tensor.data = tensor.data.to(self.device)
        banks = [bank for block in self.blocks for bank in (*block.banks, *block.dense)]
        with ExitStack() as stack:
            stack.enter_context(called_through(banks, Bank.call))
            embeddings = self.model.get_input_embeddings()
            stack.callback(embeddings.register_forward_hook(_begin).remove)
            for block in self.blocks:
                block.module.forward = self._calls(block, block.module.forward)
                stack.callback(delattr, block.module, "forward")
            yield

    def _calls(self, block: Block, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            self._come(block)
            return own(*args, **named)

        def call(*args: Any, **named: Any) -> Any:
            again = partial(run, **named)
            made = checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)
            if not self.weights:
                handed_on(made).register_hook(partial(self._add, block))
            return made

        return call

    def _add(self, block: Block, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()
        if not torch.isfinite(g).all():
            what = f"the gradient behind {block.name} is not finite"
            raise NumericsError(what, not_finite_remedy(self.model.dtype))
        outer = (g.T @ g).cpu()  # where all blocks' have room
        self.outer[block] = outer.add_(self.outer[block]) if block in self.outer else outer

    def _come(self, block: Block) -> None:
        if self.here is block:
            return
        self.leave()
        self.shards.read(block)
        block.module.to(self.device)
        for place in places(block.module):
            if (known := self._gone.pop(place, None)) is not None:
                known.data = getattr(*place).data
                setattr(*place, known)
        for parameter in {layer.parameter for layer in block.layers} if self.weights else ():
            parameter.requires_grad_()
        self.here = block

    def leave(self) -> None:
        """Take the gradients of the block that is here; what can be read again is let go."""
        if self.here is None:
            return
        for layer in self.here.layers:
            if (gradient := layer.parameter.grad) is not None:
                squares = layer.of(gradient).float().square().sum(1).cpu()
                if not torch.isfinite(squares).all():
                    what = f"the gradient of {layer.name} is not finite"
                    raise NumericsError(what, not_finite_remedy(self.model.dtype))
                self.squares[layer] = self.squares.get(layer, 0) + squares
        for place in places(self.here.module):
            parameter = getattr(*place)
            parameter.grad = None
            if place in self.shards.names:
                setattr(*place, nn.Parameter(parameter.data.to("meta"), False))
                parameter.data = parameter.data.new_empty(0)
                self._gone[place] = parameter
        self.here = None


def _begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """From here on there are gradients, whatever is left dense."""
    return output.detach().requires_grad_().clone()
