"""End-to-end tuning of the scales: all layers at once, so that the model predicts what it did.

A solver minimises the error of one site's outputs; what reaches the predictions is the sum of all
of them, and some cancel. Here the codes and zero points stay, and the scales of all groups move,
by Adam, down the mean Kullback-Leibler divergence of the quantized model's predictions from the
full-precision model's on the calibration text. It follows the second phase of EfficientQAT (Chen
et al. 2024), with these departures:

1. The aim is what the full-precision model predicts, not the text.
2. A scale moves by a factor, ``s = s0 exp(t)``: one rate serves layers of any size, and no scale
   changes its sign.
3. Some samples are held back. The scales that predict these best are kept, and those from before
   if none do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from optq.core.grid import Storage
from optq.core.weight import QuantizedWeight
from optq.errors import require_positive
from optq.formats.writer import Kept
from optq.model.blocks import Block
from optq.model.checkpoint import Checkpoint
from optq.model.layer import Layer
from optq.model.source import load_model
from optq.model.student import Student
from optq.record import DistillRecord
from optq.tuning import held_back

BETAS = (0.9, 0.99)  # of Adam


@dataclass(frozen=True)
class Distill:
    """How scales are tuned: ``steps`` of Adam, of ``batch`` samples each, at the rate ``lr`` of
    their logarithm, which falls to 0 along a cosine.

    The samples held back are looked at after every ``every`` steps, and ``patience`` looks without
    a gain end it. They are those of :mod:`optq.tuning`: blocks that have learned a sample by heart
    say nothing of others.
    """

    steps: int = 120
    batch: int = 4
    lr: float = 2e-3
    every: int = 20
    patience: int = 3

    def __post_init__(self) -> None:
        require_positive(asdict(self))


def distill(
    model: Any,
    blocks: list[Block],
    weights: Mapping[Layer, QuantizedWeight],
    tokens: Tensor,
    storage: Storage,
    settings: Distill = Distill(),
    seed: int = 0,
    progress: Callable[[int, int, float], None] = lambda *_: None,
) -> tuple[dict[Layer, Tensor], DistillRecord]:
    """The scales ``[rows, groups]`` of each layer to keep, float32, and what came of it.

    ``model`` has its original weights, and in the end those of ``weights`` with these scales.
    ``tokens`` are ``[samples, tokens]``; ``progress(step, steps, divergence)`` is called with the
    divergence of the samples held back. One that is not finite ends it: the best scales before it
    stay.
    """
    count = held_back(len(tokens))
    rest, held = tokens[:-count], tokens[-count:]
    student = Student(model, blocks, weights)
    wanted, aims = student.hidden(held), student.hidden(rest)
    student.put(storage)
    steps, taken, note = settings.steps, 0, ""
    moved, slope, best = student.moved, student.slope, torch.zeros_like(student.moved)
    adam = torch.optim.Adam([moved], betas=BETAS, eps=1e-12)  # gradients are small
    turns = _turns(len(rest), settings.batch, seed)
    with student.learning():
        before = after = student.divergence(held, wanted)
        progress(0, steps, before)
        gained = 0  # the step of the best scales
        while taken < steps:
            some = next(turns)
            aim = [aims[sample] for sample in some.tolist()]
            loss = student.divergence(rest[some], aim, learn=True)
            if not (math.isfinite(loss) and math.isfinite(after) and slope.isfinite().all()):
                note = f"the divergence was not finite in step {taken + 1}"
                break
            adam.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * taken / steps)) / 2
            adam.step()
            slope.zero_()
            student.put(storage)
            taken += 1
            if taken % settings.every == 0 or taken == steps:
                now = student.divergence(held, wanted)
                progress(taken, steps, now)
                if now < after:
                    after, best, gained = now, moved.clone(), taken
                elif taken - gained >= settings.patience * settings.every:
                    note = f"nothing was gained after step {gained}"
                    break
    moved.copy_(best)
    student.put(storage)
    record = DistillRecord(
        settings=asdict(settings),
        held_back=count,
        steps=taken,
        before=before if math.isfinite(before) else None,
        after=after if math.isfinite(after) else None,
        kept=after < before,
        note=note,
    )
    return {scales.layer: scales.now(storage) for scales in student.layers}, record


def tuned(
    checkpoint: Checkpoint,
    find: Callable[[Any], list[Block]],
    names: Mapping[str, str],
    sink: Kept,
    device: torch.device,
    *how: Any,
) -> tuple[Any, DistillRecord]:
    """A quantized model with its best scales, on the CPU; ``sink`` has them too.

    The model is read once more from ``checkpoint``, for what it predicts before it is quantized;
    ``find`` finds its blocks, and ``names`` are those on disk. ``how`` are the other arguments of
    :func:`distill`.
    """
    model = load_model(checkpoint)
    blocks = find(model)
    every = [layer for block in blocks for layer in block.layers]
    layers = {names[f"{layer.name}.weight"].removesuffix(".weight"): layer for layer in every}
    weights = {layers[name]: weight for name, weight in sink.solved()}
    if device.type == "cpu":  # as in Weights.fetch: what is written to is no page of a file
        for parameter in {layer.parameter for layer in weights}:
            parameter.data = parameter.data.clone()
    scales, record = distill(model.to(device), blocks, weights, *how)
    if record.kept:
        sink.rescale(
            {name: scales[layer].cpu() for name, layer in layers.items() if layer in scales}
        )
    return model.to("cpu"), record


def _turns(samples: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Which samples each step sees: all of them, then all of them in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from order[: max(batch, samples // batch * batch)].split(batch)
