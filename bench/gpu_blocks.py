"""One block of each of three models' shapes, quantized on a GPU: a part of ``bench/gpu.py``.

The weights and the tokens are random, for time depends on shapes alone. Each block is a checkpoint
with a small vocabulary that a ``Runner`` quantizes as any other, at 4 bits in groups of 128 with
the default settings and error propagation. Seconds are the run's own, by stage, each with the
device's work done:

* forward: both streams through the block;
* Hessian: its sums, and those of error propagation;
* factor: of the damped Hessians;
* solve: rounding, the sweep, its errors and what error propagation aims at; the sweep (its grids,
  column loop and products) is also timed by itself, as a part of that;
* polish;
* block: all of it, but for reading the checkpoint.

The shapes of Llama 3 8B are quantized once more with the column loop as torch's operations instead
of the kernel. A small run before the first keeps what is compiled and loaded once out of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from model import COMMON, CONFIGS, random_tokens, save
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen3MoeConfig

import optq.core.gptq
import optq.core.sweep
from optq import GPTQ, ModelConfig, Runner
from optq.core.clock import elapsed

SEQUENCES, LENGTH = 16, 2048
WBITS, GROUPSIZE = 4, 128
SHAPES = {
    "Llama 3 8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        **COMMON,
    ),
    "Qwen3 30B A3B": CONFIGS["experts"],
    "OPT 175B": OPTConfig(
        hidden_size=12288,
        ffn_dim=49152,
        num_hidden_layers=1,
        num_attention_heads=96,
        word_embed_proj_dim=12288,
        **COMMON,
    ),
}
# To see that everything runs, on a CPU too: the same layers, and times that mean nothing.
TINY = {
    "Llama 3 8B": LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **COMMON,
    ),
    "Qwen3 30B A3B": Qwen3MoeConfig(
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **COMMON,
    ),
    "OPT 175B": OPTConfig(
        hidden_size=64,
        ffn_dim=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        **COMMON,
    ),
}
STAGES = ("forward", "hessian", "factor", "solve", "sweep", "polish", "block")
LOOP_CASES: tuple[dict[str, Any], ...] = (
    {"groupsize": -1},
    {"groupsize": 32},
    {"groupsize": 32, "sym": False, "actorder": True},
    {"groupsize": 32, "sym": False, "actorder": True, "static_groups": True},
)


@contextmanager
def column_loop(kernel: bool) -> Iterator[None]:
    """The kernel of the column loop, or torch's operations."""
    with (
        patch.object(optq.core.sweep, "_on_gpu", lambda W: kernel),
        patch.object(optq.core.sweep, "serves", lambda W: False),
    ):
        yield


def loop_taken(device: str) -> str:
    """What runs the column loop."""
    W = torch.empty(1, device=device)
    if optq.core.sweep.serves(W):
        return "Numba"
    return "Triton" if optq.core.sweep._on_gpu(W) else "torch"


def loop_misses(device: str, rows: int, cols: int) -> list[str]:
    """The cases where the kernel's results are not those of torch's operations: more than 1e-4
    of a layer's error apart, or more than 1 of 100 codes."""
    found = []
    for options in LOOP_CASES:
        solver = GPTQ.plain(WBITS, **options)
        weights = [torch.randn(rows, cols, device=device) for _ in range(2)]
        inputs = [torch.randn(4 * cols, cols, device=device) for _ in range(2)]
        mixed = [x @ (torch.randn(cols, cols, device=device) / cols**0.5) for x in inputs]
        solved = []
        for kernel in (True, False):
            sites = [solver.problem(x.T @ x / len(x)) for x in mixed]
            with column_loop(kernel):
                solved.append(solver.solve_together(sites, weights, [None, None]))
        for ours, theirs in zip(*solved, strict=True):
            off = abs(ours.error.sum() / theirs.error.sum() - 1).item()
            other = (ours.codes != theirs.codes).double().mean().item()
            if not (off < 1e-4 and other < 0.01):
                found.append(f"column loop, {options}: error off by {off:.1e}, codes {other:.1%}")
    return found


@contextmanager
def sweeps(device: str) -> Iterator[list[float]]:
    """Seconds of each sweep."""
    found, inner, there = [], optq.core.gptq.Sweep, torch.empty(0, device=device)

    def sweep(*args: Any) -> Any:
        elapsed(0, there)  # what is under way is not the sweep's
        start = perf_counter()
        made = inner(*args)
        found.append(elapsed(start, there))
        return made

    with patch.object(optq.core.gptq, "Sweep", sweep):
        yield found


def quantized(checkpoint: Path, device: str, tokens: torch.Tensor, groupsize: int) -> dict:
    """One run: seconds by stage, and the most memory that it took on a GPU."""
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with sweeps(device) as swept:
        config = ModelConfig(str(checkpoint), device)
        seconds = Runner(config, GPTQ(WBITS, groupsize), qep=True, calib=tokens).run().seconds
    block = seconds["total"] - seconds["load"]
    found = seconds | {"sweep": sum(swept), "block": block}
    memory = {"peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1)} if gpu else {}
    return {stage: round(found[stage], 3) for stage in STAGES} | memory


def blocks(shapes: dict[str, PreTrainedConfig], device: str, tokens: torch.Tensor, groupsize: int):
    """One record to a shape, and one more of the first with the loop as torch's operations.

    What does not fit on the device is said to.
    """
    for index, (name, config) in enumerate(shapes.items()):
        record = {"shape": name, "tokens": tokens.numel(), "wbits": WBITS, "groupsize": groupsize}
        with TemporaryDirectory() as scratch:
            checkpoint = Path(scratch)
            try:
                with torch.device(device):
                    save(config, checkpoint)
                torch.cuda.empty_cache()
                for loop in (nullcontext(), column_loop(False))[: 1 if index else 2]:
                    with loop:
                        record["loop"] = loop_taken(device)
                        yield record | quantized(checkpoint, device, tokens, groupsize)
            except torch.OutOfMemoryError:
                yield record | {"failure": "out of memory"}


def measured(quick: bool) -> list[dict]:
    """All shapes on the first GPU; ``quick``: the first alone."""
    list(blocks(TINY, "cuda", random_tokens(2, 64), 32))  # compiles, and loads libraries
    shapes = dict(list(SHAPES.items())[: 1 if quick else None])
    return list(blocks(shapes, "cuda", random_tokens(SEQUENCES, LENGTH), GROUPSIZE))


def table(records: list[dict]) -> str:
    """One line to a record, in seconds."""
    names = ["forward", "Hessian", "factor", "solve", "(sweep)", "polish", "block", "peak GB"]
    lines = ["one block      loop    " + "".join(f"{name:>9}" for name in names)]
    for record in records:
        line = f"{record['shape']:15}{record.get('loop', ''):8}"
        if "failure" in record:
            lines.append(line + "  " + record["failure"])
            continue
        line += "".join(f"{record[stage]:9.3f}" for stage in STAGES)
        lines.append(line + (f"{record['peak_GB']:9.1f}" if "peak_GB" in record else ""))
    return "\n".join(lines)
