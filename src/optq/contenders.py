"""What `optq compare` can put on one table: one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optq.budget import Mixed
from optq.config import ModelConfig
from optq.core.gptq import BEST, GPTQ
from optq.core.pruning import Pattern, Pruner
from optq.core.rtn import RTN
from optq.core.smoothquant import SmoothQuant
from optq.core.sparsegpt import SparseGPT
from optq.core.tokens import ABITS
from optq.errors import SettingError
from optq.evaluate.llm_int8 import LLMInt8
from optq.formats import form_of
from optq.formats.fit import check_layers
from optq.model.blocks import Block, find_blocks
from optq.quantize import check_experts
from optq.result import Result
from optq.runner import Runner


@dataclass(frozen=True)
class Job:
    """What a contender is given: a model, calibration tokens, and layers to leave dense."""

    config: ModelConfig
    tokens: Tensor
    skip: str | None
    bits: float


@dataclass(frozen=True)
class Made:
    """What it gives: a model that computes as the method does, and what its layers would take.

    ``result``: of the run, where there was one.
    """

    model: Any
    bits_per_weight: float
    bytes: int
    result: Result | None = None


@dataclass(frozen=True)
class Contender:
    """A method: ``build`` takes bits and group size, and gives what ``make`` makes a model with.

    Its ``repr`` says all that decides the model, with what is below. With ``bits`` of its own it
    is one row, whatever widths and groups are asked for. ``abits`` and ``sparsity`` are told on.
    """

    build: Callable[[Any, int], Any]
    make: Callable[[Contender, Any, Job], Made]
    bits: int | None = None
    propagates: Callable[[float], bool] = lambda bits: False
    tune: str | None = None
    reads: bool = True  # the calibration text; else one sequence finds the layers
    abits: int | None = None
    sparsity: float | None = None

    def check(self, built: Any, blocks: Sequence[Block]) -> None:
        """Refuse, before any work, layers that would be refused after it."""
        if isinstance(built, RTN | GPTQ | Mixed | SmoothQuant | Pruner):
            scheme = built.scheme()
            check_experts(scheme, blocks)
            check_layers(form_of(None, scheme), blocks, scheme, ())
        if isinstance(built, LLMInt8):
            built.check(blocks)
        if isinstance(built, Pruner):
            for layer in (layer for block in blocks for layer in block.layers):
                built.check_layer(layer.name, *layer.shape)


def _quantized(contender: Contender, built: Any, job: Job) -> Made:
    tokens = job.tokens if contender.reads else job.tokens[:1]
    runner = Runner(job.config, built, contender.propagates(job.bits), calib=tokens, skip=job.skip)
    runner.tune = contender.tune
    result = runner.run()
    model = result.model.to(job.config.torch_device())
    return Made(model, result.bits_per_weight, result.bytes, result)


def _in_place(contender: Contender, built: LLMInt8, job: Job) -> Made:
    model, _ = job.config.load()
    blocks = find_blocks(model, job.skip)
    weights = sum(layer.weight.numel() for block in blocks for layer in block.layers)
    size = built.apply(model, blocks)
    return Made(model, 8 * size / weights, size)


def _best(bits: float) -> bool:
    return BEST[int(bits)].qep


# "gptq" and "best" propagate errors where that is the default.
CONTENDERS: dict[str, Contender] = {
    "rtn": Contender(RTN, _quantized, reads=False),
    "plain": Contender(GPTQ.plain, _quantized),
    "no-qep": Contender(GPTQ, _quantized),
    "gptq": Contender(GPTQ, _quantized, propagates=_best),
    "best": Contender(GPTQ, _quantized, propagates=_best, tune="model"),
    "w8a8": Contender(lambda *_: SmoothQuant(alpha="off"), _quantized, ABITS, abits=ABITS),
    "smoothquant": Contender(lambda *_: SmoothQuant(), _quantized, ABITS, abits=ABITS),
    "llm-int8": Contender(lambda *_: LLMInt8(), _in_place, ABITS, abits=ABITS),
}
BUDGET = Contender(
    lambda bits, groupsize: Mixed(bits_per_weight=bits, groupsize=groupsize),
    _quantized,
    propagates=lambda bits: True,
)


PRUNED = "prune-"  # and a sparsity


def _pruned(sparsity: str) -> Contender:
    """Weights removed, the others in 16 bits, as ``optq prune`` does it."""
    return Contender(
        lambda *_: SparseGPT(sparsity),
        _quantized,
        16,
        propagates=lambda bits: True,
        sparsity=Pattern.of_text(sparsity).share,
    )


def contender(method: str) -> Contender:
    """The row of a name. Raises ``SettingError`` for one that is none."""
    if method == "budget":
        return BUDGET
    if method.startswith(PRUNED):
        return _pruned(method.removeprefix(PRUNED))
    if method not in CONTENDERS:
        known = f"{', '.join(CONTENDERS)}, {PRUNED}0.5 or {PRUNED}2:4"
        raise SettingError(f"the method {method} is unknown", f"choose {known}")
    return CONTENDERS[method]
