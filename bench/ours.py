"""Quantize the benchmark's model with OPTQ; the counterpart of the scripts in ``bench/peers``.

OPTQ imports transformers when a run needs it. Here that happens first, because the peers import
it before their clocks start, too. The paper's algorithm, or with ``--best default`` OPTQ's own
settings, with ``--best qep`` those and error propagation.
"""

from pathlib import Path

import torch
from peers.measure import Measurement, arguments
from torch import Tensor
from transformers.models.llama import modeling_llama  # noqa: F401

from optq import GPTQ, ModelConfig, Runner, __version__


def quantize(
    model: Path, tokens: Tensor, out: Path, best: str | None, groupsize: int
) -> dict[str, float]:
    """Run OPTQ; seconds by phase: total, load, forward, hessian, factor, solve, write."""
    result = Runner(
        ModelConfig(model_id=str(model), device="cpu"),
        GPTQ(4, groupsize) if best else GPTQ.plain(4, groupsize),
        qep=best == "qep",
        calib=tokens,
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        output=str(out),
    ).run()
    return result.seconds


def main() -> None:
    args = arguments()
    tokens = torch.load(args.tokens)
    measurement = Measurement(args.model)
    with measurement.seconds("whole"):
        seconds = quantize(args.model, tokens, args.out, args.best, args.groupsize)
    measurement.peak()
    # The run loads and writes block by block as it goes; its own clocks tell those two apart.
    whole = measurement.numbers.pop("whole_seconds")
    measurement.numbers |= {
        "load_seconds": round(seconds["load"], 3),
        "quantize_seconds": round(whole - seconds["load"] - seconds["write"], 3),
        "save_seconds": round(seconds["write"], 3),
        "phases": {name: round(value, 3) for name, value in seconds.items()},
    }
    measurement.print("optq", __version__, torch.__version__)


if __name__ == "__main__":
    main()
