"""Measure models, and compare quantizers by the perplexity that they leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from optq.core.gptq import GPTQ
from optq.core.rtn import RTN
from optq.data.evaluation import evaluation_tokens
from optq.errors import NumericsError
from optq.evaluate.perplexity import Perplexity, perplexity
from optq.model.blocks import find_blocks
from optq.quantize import Quantizer
from optq.runner import METHODS, ModelConfig, Runner, sequence_length

DEMO_SEQLEN = 512  # what the bundled model was trained on
DEMO_SAMPLES = 64
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Row:
    """One quantizer on one model; ``method`` is ``none`` for the model as it is."""

    method: str
    wbits: int
    groupsize: int
    bits_per_weight: float
    bytes: int  # of the layers that are quantized, or would be
    perplexity: float


def measure(
    config: ModelConfig, text: str, seqlen: int | None = None, progress: Progress | None = None
) -> tuple[Perplexity, int]:
    """Perplexity of a model on a text, and the length of its windows."""
    model, tokenizer = config.load()
    seqlen = sequence_length(model, seqlen)
    windows = evaluation_tokens(text, tokenizer, seqlen)
    note = f"{len(windows)} windows of {seqlen} tokens"
    report = None if progress is None else (lambda done, total: progress(done, total, note))
    result = perplexity(model, windows, progress=report)
    if not math.isfinite(result.perplexity):
        raise NumericsError(
            f"the perplexity is beyond floating point: the mean loss is {result.nll:.4g} nats",
            "check that tokenizer and weights belong together",
        )
    return result, seqlen


def demo_rows(device: str, progress: Progress) -> list[Row]:
    """The bundled model as it is, rounded, and with GPTQ, at 4, 3 and 2 bits."""
    config = ModelConfig("demo", device)
    quantizers: list[Quantizer] = []
    for wbits in (4, 3, 2):
        quantizers.append(RTN(wbits, groupsize=128))
        quantizers.append(GPTQ(wbits, 128, actorder=True, static_groups=True, mse=True))
    steps = len(quantizers) + 1
    progress(0, steps, "full precision")
    model, tokenizer = config.load()
    windows = evaluation_tokens("demo", tokenizer, DEMO_SEQLEN)
    layers = [layer for block in find_blocks(model) for layer in block.layers]
    size = sum(layer.weight.nbytes for layer in layers)
    bits = 8 * layers[0].weight.element_size()
    rows = [Row("none", bits, -1, bits, size, perplexity(model, windows).perplexity)]
    names = {solver: name for name, solver in METHODS.items()}
    for step, quantizer in enumerate(quantizers, start=1):
        method = names[type(quantizer)]
        progress(step, steps, f"{method} at {quantizer.wbits} bits")
        result = Runner(config, quantizer, nsamples=DEMO_SAMPLES, seqlen=DEMO_SEQLEN).run()
        rows.append(
            Row(
                method,
                quantizer.wbits,
                quantizer.groupsize,
                result.bits_per_weight,
                result.bytes,
                perplexity(result.model.to(config.torch_device()), windows).perplexity,
            )
        )
    return rows
