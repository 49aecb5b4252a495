"""Block tuning: codes and scales of a solved block, by what the block as a whole makes of them.

A solver sees one site at a time, and each of its rows by itself. A block has its sites in sequence
and sums rows up; and what it hands on differs from full precision by what the blocks before it did,
too. Here all its layers move together, by Adam, down

    mean over tokens of  (y - y*) M (y - y*)^T

where ``y*`` is what the full-precision block makes of full-precision inputs, ``y`` what this one
makes of what it will be given, and ``M`` how much the model's predictions feel an error there, in
every direction (:func:`optq.model.sensitivity.metrics`): the sum is an estimate of the divergence
of the predictions, in nats. A code moves as a real number that is rounded in the forward pass and
not in the backward one (straight-through); a scale by a factor ``exp(t)``. It follows Block-AP of
EfficientQAT (Chen et al. 2024), with these departures:

1. It starts from a solver's codes, each in the middle of its cell: one that moves has been pushed
   over half a cell, by steps that agree. From where full precision lies in its cell the error of
   samples held back rose.
2. ``M`` in the place of ones.
3. Some samples are held back. What serves these best stays, and what the solver found if nothing
   serves better. Of single rows nothing is promised any more.

Zero points stay. What is measured is what will be stored. (Numbers: docs/log.md.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from optq.core.grid import Storage
from optq.core.weight import QuantizedWeight
from optq.errors import ModelError, require_positive
from optq.model.batch import Passed, handed_on
from optq.model.blocks import Block
from optq.model.checkpoint import Checkpoint
from optq.model.layer import Layer
from optq.model.leaves import learning
from optq.model.sensitivity import metrics, some_of
from optq.model.shards import open_model
from optq.record import TunedBlock

Passage = tuple[Passed, Passed]  # of one batch through a block: quantized, in full precision

BETAS = (0.9, 0.95)  # of Adam
EPSILON = 1e-12  # gradients are small
WARM = 10  # steps until the rates are whole
APART = 8  # of so many samples one is held back
WIDER = 0.6  # of the steps, in a block without 2 bits: its codes have half as far to go, or less
RIDGE = 0.5  # of the mean of M's diagonal: M is known from few tokens


def held_back(samples: int) -> int:
    """How many samples no step sees, neither here nor in :mod:`optq.distill`: the last ones."""
    return max(1, samples // APART)


@dataclass(frozen=True)
class Tuning:
    """How a block is tuned: in ``steps`` of about ``tokens`` tokens (three fifths of them where no
    layer has 2 bits), at rates that fall to 0 along a line. ``reach`` is how far a code can come
    with all of them, in units of a grid of 2 bits;
    with twice the levels half as far: what a step of a code is worth falls faster than what
    gradients of few tokens are off by. ``scales`` is the rate of the scales' logarithms.

    ``looks`` times the samples are looked at that are held back.
    """

    steps: int = 200
    tokens: int = 2048
    reach: float = 2.0
    scales: float = 2e-3
    looks: int = 4

    def __post_init__(self) -> None:
        require_positive(asdict(self))

    def steps_at(self, least: int) -> int:
        """Of a block whose layers have so many bits at ``least``."""
        return self.steps if least == 2 else math.ceil(WIDER * self.steps)

    def rate(self, wbits: int, steps: int) -> float:
        """Of codes, at the start of ``steps``, in units of their grid."""
        return 2 * self.reach * 4 / 2**wbits / steps

    def batch(self, samples: int, seqlen: int) -> int:
        """How many samples run together."""
        return max(1, min(self.tokens // seqlen, samples - held_back(samples)))

    def batches(self, tokens: Tensor) -> list[Tensor]:
        """Of the calibration ``tokens``; none has both samples that are held back and others."""
        size, count = self.batch(*tokens.shape), held_back(len(tokens))
        return [*tokens[:-count].split(size), *tokens[-count:].split(size)]


@dataclass(frozen=True)
class Tuner:
    """What is known before the first block; ``metrics`` are those of all blocks, in order."""

    settings: Tuning
    metrics: list[Tensor]
    storage: Storage
    seed: int

    @classmethod
    def of(
        cls,
        settings: Tuning,
        storage: Storage,
        seed: int,
        checkpoint: Checkpoint,
        find: Callable[[Any], list[Block]],
        tokens: Tensor,
        device: torch.device,
    ) -> Tuner:
        """From a model of its own, whose blocks ``find`` finds, no head, and some ``tokens``."""
        model, blocks, shards = open_model(checkpoint, find)
        found = metrics(model, blocks, shards, some_of(tokens), device)
        return cls(settings, found, storage, seed)

    def tune(
        self, block: Block, weights: Mapping[Layer, QuantizedWeight], passages: Sequence[Passage]
    ) -> tuple[dict[Layer, QuantizedWeight] | None, TunedBlock]:
        """As :func:`tune`."""
        metric = self.metrics[block.index]
        return tune(block, weights, passages, metric, self.storage, self.settings, self.seed)


def tune(
    block: Block,
    weights: Mapping[Layer, QuantizedWeight],
    passages: Sequence[Passage],
    metric: Float[Tensor, "hidden hidden"],
    storage: Storage,
    settings: Tuning = Tuning(),
    seed: int = 0,
) -> tuple[dict[Layer, QuantizedWeight] | None, TunedBlock]:
    """The weights that serve better, which are then in the block; None: those that it has do.

    Raises :class:`ModelError` for a block that changes what it is called with.
    """
    if not all(passed.whole for pair in passages for passed in pair):
        raise ModelError(f"{block.name} changes what it is called with", "leave out --tune")
    samples = [len(handed_on(full.made)) for _, full in passages]
    back = held_back(sum(samples))
    first = next(i for i in range(len(samples)) if sum(samples[i:]) <= back)
    rest, held = passages[:first], passages[first:]
    metric = metric.to(next(iter(weights.values())).scales.device)
    metric = metric + RIDGE * metric.diagonal().mean() * torch.eye(
        len(metric), device=metric.device
    )
    work = {layer: _Moving(layer, weight) for layer, weight in weights.items()}
    error = partial(_error, block, metric)
    before = after = _mean(error, held)
    best: dict[Layer, QuantizedWeight] | None = None
    most = settings.steps_at(min(weight.wbits for weight in weights.values()))
    note, steps, taken = "", most if before > 0 else 0, 0
    if not math.isfinite(before):
        note = "its error was not finite before any step"
    adam = torch.optim.Adam(
        [
            {"params": [each.moved for each in work.values()], "rate": settings.scales},
            *(
                {"params": [x.units], "rate": settings.rate(x.weight.wbits, most)}
                for x in work.values()
            ),
        ],
        betas=BETAS,
        eps=EPSILON,
        fused=True,
    )
    turns = _turns(len(rest), seed)
    take = learning(
        block.module, work, block.banks, lambda layer, gradient: work[layer].learn(gradient)
    )
    with take:
        while taken < steps:
            with torch.enable_grad():
                loss = error(rest[next(turns)]) / before
            loss.backward()
            if not (math.isfinite(loss.item()) and all(x.finite for x in work.values())):
                note = f"the error was not finite in step {taken + 1}"
                break
            for group in adam.param_groups:
                group["lr"] = group["rate"] * min(1, (taken + 1) / WARM) * (1 - taken / steps)
            adam.step()
            adam.zero_grad()
            for each in work.values():
                each.put(storage)
            taken += 1
            if taken % max(1, steps // settings.looks) == 0 or taken == steps:
                now = _mean(error, held)
                if now < after:
                    after, best = now, {layer: each.now() for layer, each in work.items()}
    for layer, weight in (best or weights).items():
        layer.put(weight.weight)
    record = TunedBlock(
        block=block.name,
        steps=taken,
        before=before if math.isfinite(before) else None,
        after=after if math.isfinite(after) else None,
        moved=_share(weights, best) if best else 0.0,
        kept=best is not None,
        note=note,
    )
    return best, record


class _Moving:
    """One layer's codes and scales as real numbers that move, and the gradients of both."""

    def __init__(self, layer: Layer, weight: QuantizedWeight) -> None:
        self.layer, self.weight = layer, weight
        dtype = torch.promote_types(weight.scales.dtype, torch.float32)
        self.group = weight.g_idx.long()
        whole = weight.consecutive and weight.cols == weight.groups * weight.width
        self.shape = (weight.rows, weight.groups, -1) if whole else (weight.rows, weight.cols)
        zeros = self._spread(weight.zeros.to(dtype))
        self.low, self.high = -zeros, 2**weight.wbits - 1 - zeros
        self.units = weight.codes.to(dtype).view(self.shape).sub(zeros)
        self.moved = torch.zeros_like(weight.scales, dtype=dtype)
        self._set(weight.scales.to(dtype))

    def put(self, storage: Storage) -> None:
        """What they are now goes into the model, rounded."""
        self.units.clamp_(self.low, self.high)
        self._set(storage.round(self.weight.scales * self.moved.exp()))
        self.layer.put((self.rounded * self._spread(self.scale)).view(self.weight.codes.shape))

    def _set(self, scale: Tensor) -> None:
        self.scale, self.rounded = scale, self.units.round()

    def learn(self, gradient: Float[Tensor, "rows cols"]) -> None:
        """From the gradient of the weight; none goes through the rounding."""
        wanted = gradient.to(self.units.dtype).reshape(self.shape)
        product = (wanted * self.rounded).view(self.weight.codes.shape)
        self.moved.grad = self.weight.by_group(product).mul_(self.scale)
        self.units.grad = wanted * self._spread(self.scale)

    @property
    def finite(self) -> bool:
        """Whether the last gradient was, if there is one."""
        return self.moved.grad is None or bool(self.moved.grad.isfinite().all())

    def now(self) -> QuantizedWeight:
        """As it will be stored."""
        codes = (self.rounded - self.low).to(torch.uint8).view(self.weight.codes.shape)
        return replace(self.weight, codes=codes, scales=self.scale.to(self.weight.scales.dtype))

    def _spread(self, of_groups: Tensor) -> Tensor:
        """What each group has, for each of its columns."""
        return of_groups[:, :, None] if len(self.shape) == 3 else of_groups[:, self.group]


def _error(block: Block, metric: Tensor, pair: Passage) -> Tensor:
    """The sum over the tokens of a batch."""
    own, full = pair
    args, kwargs = _on(metric.device, own.args), _on(metric.device, own.kwargs)
    made, wanted = handed_on(block.module(*args, **kwargs)), handed_on(full.made)
    error = (made - wanted.to(metric.device)).flatten(0, -2).to(metric.dtype)
    return (error @ metric).mul(error).sum()


def _mean(error: Callable[[Passage], Tensor], pairs: Sequence[Passage]) -> float:
    with torch.no_grad():
        total = sum(error(pair).item() for pair in pairs)
    return total / sum(handed_on(full.made).shape[:-1].numel() for _, full in pairs)


def _on(device: torch.device, value: Any) -> Any:
    """What a block is called with, from where there was room for it."""
    if isinstance(value, Tensor):
        return value.to(device)
    if device.type == "cpu":
        return value
    if isinstance(value, dict):
        return type(value)({name: _on(device, each) for name, each in value.items()})
    if isinstance(value, list | tuple):
        each = [_on(device, one) for one in value]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    return value


def _turns(batches: int, seed: int) -> Iterator[int]:
    """Which batch each step sees: all of them, then all of them in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(batches, generator=generator).tolist()


def _share(
    before: Mapping[Layer, QuantizedWeight], after: Mapping[Layer, QuantizedWeight]
) -> float:
    """Of all codes, those that moved."""
    moved = sum(int((before[layer].codes != each.codes).sum()) for layer, each in after.items())
    return moved / sum(each.codes.numel() for each in after.values())
