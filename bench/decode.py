"""Whole-model decoding and loading on the CPU: ``python bench/decode.py``.

A random Llama of 1B-class shapes (hidden 2048, intermediate 8192, 8 layers, vocabulary 32000) at
4 bits in groups of 128, beside the same model with bfloat16 weights: `optq bench` on it, several
times. Then a checkpoint of 1 GB packed (hidden 4096, intermediate 11008, 10 layers) is loaded. The
codes are random: speed depends on shapes alone. Prints, and appends one record to
bench/results/decode.jsonl.

``--prompts``: the first of the two reads prompts, and one token of several sequences at once,
beside the same model in bfloat16, in turns: how many times as fast it is, a median.

``--experts``: a random Qwen3-MoE instead (hidden 1024, 64 experts of 512, 8 chosen, 8 layers),
beside transformers' own experts in bfloat16, in each of its implementations.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from kernels import random_weight
from machine import append, machine
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

import optq
from optq.evaluate.speed import measure_speed, model_speed
from optq.formats.gptq import GPTQ_V1
from optq.formats.scheme import LayerScheme
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.linear import make_dense
from optq.model.source import empty_model

RESULTS = Path(__file__).parent / "results" / "decode.jsonl"


def config(hidden: int, intermediate: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=32000,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write(folder: Path, config: PretrainedConfig) -> int:
    """A checkpoint with random codes, one shard to a block; the bytes of its packed layers."""
    scheme, size, where = LayerScheme(4, 128, True), 0, {}
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")  # a name for the skeleton, replaced below
    skeleton = empty_model(Checkpoint(folder, {}, {}))
    blocks = find_blocks(skeleton)
    layers = [layer for block in blocks for layer in block.layers]
    inside = {id(layer.parameter) for layer in layers}

    def shard(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))

    (folder / "model.safetensors").unlink()
    for block in blocks:
        tensors = {}
        for layer in block.layers:
            parts = GPTQ_V1.encode(random_weight(*layer.shape, 4, 128), torch.bfloat16, True)
            size += sum(part.nbytes for part in parts.values())
            tensors |= {f"{layer.name}.{suffix}": part for suffix, part in parts.items()}
        shard(f"model-{block.index}.safetensors", tensors)
    rest = {n: p for n, p in skeleton.named_parameters() if id(p) not in inside}
    shard(
        "model-rest.safetensors", {n: torch.randn(p.shape).bfloat16() / 50 for n, p in rest.items()}
    )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": where})
    )
    settings = GPTQ_V1.config({"any": scheme}, [], 0.01)
    whole = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(whole))
    return size


def experts(runs: int) -> dict[str, object]:
    """Tokens per second of the packed model and of dense ones, in turns, and the experts' bytes."""
    config = Qwen3MoeConfig(
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_experts=64,
        num_experts_per_tok=8,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=8000,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found: dict[str, list[float]] = {}
    with TemporaryDirectory() as scratch:
        write(Path(scratch), config)
        packed = optq.load(scratch, "cpu")
        for _ in range(runs):
            for implementation in ("grouped_mm", "eager"):
                dense.set_experts_implementation(implementation)
                found.setdefault(implementation, []).append(model_speed(dense, 0).decode)
            found.setdefault("packed", []).append(model_speed(packed, 0).decode)
    best = [max(pair) for pair in zip(found["grouped_mm"], found["eager"], strict=True)]
    ratios = [ours / theirs for ours, theirs in zip(found["packed"], best, strict=True)]
    banks = [m for m in packed.modules() if type(m).__name__ == "Qwen3MoeExperts"]
    size = sum(buffer.nbytes for bank in banks for buffer in bank.buffers())
    weights = sum(p.numel() for n, p in dense.named_parameters() if ".experts." in n)
    return {
        "tokens/s": {name: [round(x, 2) for x in each] for name, each in found.items()},
        "ratio to the faster": round(statistics.median(ratios), 3),
        "memory": round(size / (2 * weights), 4),
    }


def prompts(runs: int) -> dict[str, object]:
    """Seconds of the packed model and of the same with bfloat16 weights, by rows of activations."""
    with TemporaryDirectory() as scratch:
        write(Path(scratch), config(2048, 8192, 8))
        packed, dense = optq.load(scratch, "cpu"), optq.load(scratch, "cpu")
    make_dense(dense)
    found: dict[str, object] = {}
    for name, sequences, tokens in (
        *((f"prompt of {tokens}", 1, tokens) for tokens in (16, 32, 64, 128, 256, 500)),
        *((f"a token of {count}", count, 1) for count in (1, 2, 4, 8, 12, 16)),
    ):
        ids = torch.randint(32000, (sequences, tokens))
        read = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
        ours, theirs = partial(packed, **read), partial(dense, **read)
        with torch.no_grad():
            times = paired(ours, theirs, runs)
        ratio = statistics.median(t / o for o, t in zip(*times, strict=True))
        found[name] = {
            "ratio": round(ratio, 3),
            "ms": round(statistics.median(times[0]) * 1e3, 2),
            "bfloat16_ms": round(statistics.median(times[1]) * 1e3, 2),
        }
        print(f"{name:14}", found[name], flush=True)
    return {"prompts": found}


def paired(ours: Callable[[], object], theirs: Callable[[], object], runs: int):
    """Times of two functions that take turns, the first of them left out."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs + 1):
        for function, kept in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return times[0][1:], times[1][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--prompts", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.experts:
        record = {"bench": "decode, experts", **machine(), **experts(arguments.runs)}
        print(record)
        append(RESULTS, record)
        return
    if arguments.prompts:
        record = {"bench": "decode, prompts", **machine(), **prompts(arguments.runs)}
        append(RESULTS, record)
        return
    record = {"bench": "decode", **machine()}
    with TemporaryDirectory() as scratch:
        write(Path(scratch), config(2048, 8192, 8))
        reports = [
            measure_speed(optq.load(scratch, "cpu"), lambda *_: None) for _ in range(arguments.runs)
        ]
    ratios = [report.packed.decode / report.dense.decode for report in reports]
    record["decode"] = {
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "memory": round(reports[0].packed.bytes / reports[0].dense.bytes, 4),
        "reports": [asdict(report) for report in reports],
    }
    print({k: v for k, v in record["decode"].items() if k != "reports"})
    for report in reports:
        print(
            f"decode {report.packed.decode:.2f} against {report.dense.decode:.2f} tokens/s, "
            f"prefill {report.packed.prefill:.0f} against {report.dense.prefill:.0f}"
        )
    with TemporaryDirectory() as scratch:
        size = write(Path(scratch), config(4096, 11008, 10))
        times = []
        for _ in range(arguments.runs):
            start = time.perf_counter()
            optq.load(scratch, "cpu")
            times.append(time.perf_counter() - start)
    record["load"] = {"packed_bytes": size, "seconds": [round(t, 2) for t in times]}
    print(record["load"])
    append(RESULTS, record)


if __name__ == "__main__":
    main()
