"""The Triton kernels on one NVIDIA GPU: right first, then their times beside dense bfloat16.

    python bench/gpu.py [--quick] [--only PART] [--out bench/results/gpu.jsonl]

1. Every kind of layout and every path (matrix-vector, tensor cores, dequantize and multiply)
   against float64 on the same codes and activations; then each product that is timed, as it was
   tuned; the sweep's column loop against torch's operations. A miss ends the run, exit status 1.
2. Products. One time is a CUDA graph of launches, which keeps the launches' cost on the host out
   of it, over copies of the weight that together are several times the L2 cache, which keeps the
   cache out of it: per launch, the median of REPLAYS replays. Bandwidth is what the weight, the
   activations and the result take, once each, over that time, as a share of what a large copy
   reaches in the same run (bytes read plus bytes written).
3. Decoding with a random model of the shape of Llama 3 8B, batch 1: bfloat16, then its blocks'
   layers at 4 bits in groups of 128 (embedding and head stay bfloat16), by the same decoder.
4. Blocks: one of each of three models' shapes is quantized, timed by stage: bench/gpu_blocks.py.

Prints a table of each part and appends one record. Most of the first run is compiling; Triton keeps
the results in its cache. ``--only products``, ``decoding`` or ``blocks`` is one part by itself.
Without a GPU it says so and ends with status 2. ``--tiny`` is part 4 on tiny shapes, on a CPU too,
to see that it runs: nothing is recorded.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import gpu_blocks
import torch
import triton
from gpu_checks import ERROR, misses, random_weight, relative_error, untuned
from machine import append, machine
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from optq.evaluate.graph import GraphDecoder, capturable
from optq.kernels.triton_product import FEW, MANY, TritonProduct
from optq.model.linear import QuantizedLinear

SHAPES = ((8192, 8192), (28672, 8192), (4096, 4096), (11008, 4096))  # rows, columns
BITS, TOKENS, GROUPSIZE = (4, 3, 2, 8), (1, 4, 16, 64), 128
REPLAYS, LAUNCHES, CACHES = 20, 48, 4  # launches in a graph, at least; L2 sizes to exceed
PROMPT, NEW, RUNS = 32, 128, 3
RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"


def seconds(calls: list[Callable[[], object]]) -> float:
    """Seconds for one of ``calls``, which are captured one after the other, several times over."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # kernels are compiled and tuned here
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    rounds = -(-LAUNCHES // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for replay in range(3 + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) / 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy from device to device."""
    source = torch.randint(256, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)])


def bytes_of(product: TritonProduct) -> int:
    return sum(buffer.nbytes for buffer in product.buffers())


def copies(size: int) -> int:
    """How many buffers of ``size`` bytes exceed CACHES times the L2 cache."""
    return 1 + CACHES * torch.cuda.get_device_properties(0).L2_cache_size // size


def products(shapes: tuple, bits: tuple, tokens: tuple, bandwidth: float) -> list[dict]:
    """One record for each shape, bit width and number of rows of activations."""
    records = []
    for rows, cols in shapes:
        weights = [
            0.02 * torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
            for _ in range(copies(2 * rows * cols))
        ]
        inputs = [torch.randn(n, cols, device="cuda", dtype=torch.bfloat16) for n in tokens]
        dense = {
            len(x): seconds([lambda x=x, w=w: torch.matmul(x, w.T) for w in weights])
            for x in inputs
        }
        del weights
        for wbits in bits:
            weight = random_weight(wbits, rows, cols, GROUPSIZE, True, False, "cuda")
            first, exact = TritonProduct(weight, torch.bfloat16), weight.weight.double()
            packed = [first, *(copy.deepcopy(first) for _ in range(copies(bytes_of(first)) - 1))]
            for x in inputs:
                error = relative_error(first(x), x.double() @ exact.T)  # as tuned for this shape
                if not error < ERROR[x.dtype]:
                    raise SystemExit(f"{rows} x {cols}, {wbits} bits, {len(x)}: error {error:.2e}")
                ours = seconds([lambda x=x, product=product: product(x) for product in packed])
                moved = bytes_of(first) + 2 * len(x) * (rows + cols)
                records.append(
                    {
                        "shape": [rows, cols],
                        "wbits": wbits,
                        "tokens": len(x),
                        "dense_us": round(1e6 * dense[len(x)], 2),
                        "ours_us": round(1e6 * ours, 2),
                        "ratio": round(dense[len(x)] / ours, 3),
                        "GB_per_s": round(moved / ours / 1e9, 1),
                        "share_of_copy": round(moved / ours / bandwidth, 3),
                    }
                )
            del packed, first
    return records


def llama(layers: int) -> LlamaConfig:
    """The shape of Llama 3 8B."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def quantize(model: nn.Module, wbits: int, groupsize: int) -> None:
    """Random packed weights in the place of every linear layer of the blocks."""
    names = [name for name, module in model.model.layers.named_modules() if _linear(module)]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        holder = model.model.layers.get_submodule(parent)
        rows, cols = getattr(holder, attribute).weight.shape
        device = str(model.device)
        weight = random_weight(wbits, rows, cols, groupsize, True, False, device)
        layer = QuantizedLinear(weight.cols, weight.rows, bias=False)
        layer.fill(weight, model.dtype)
        setattr(holder, attribute, layer)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def tokens_per_second(model: nn.Module, new: int) -> float:
    """Decoding after a prompt of PROMPT tokens: the median of RUNS, the first step left out."""
    assert capturable(model)
    decoder = GraphDecoder(model, PROMPT + new + 2)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), device=model.device)
    rates = []
    for _ in range(RUNS):
        token = decoder.prefill(ids).argmax()
        token = decoder.step(token).argmax()
        _wait(model)
        start = time.perf_counter()
        for _ in range(new):
            token = decoder.step(token).argmax()
        _wait(model)
        rates.append(new / (time.perf_counter() - start))
    return statistics.median(rates)


def _wait(model: nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def decoding(config: LlamaConfig, device: str, new: int) -> dict[str, float]:
    """Tokens a second of the model in bfloat16 and with 4-bit layers."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    dense = tokens_per_second(model, new)
    quantize(model, 4, GROUPSIZE)
    ours = tokens_per_second(model, new)
    return {"dense": round(dense, 1), "ours": round(ours, 1), "ratio": round(ours / dense, 3)}


def table(records: list[dict]) -> str:
    lines = ["rows x columns  bits  batch   dense us    ours us   ratio     GB/s   of copy"]
    for record in records:
        rows, cols = record["shape"]
        lines.append(
            f"{rows:>6} x {cols:<5} {record['wbits']:>5} {record['tokens']:>6}"
            f" {record['dense_us']:>10.2f} {record['ours_us']:>10.2f} {record['ratio']:>7.2f}"
            f" {record['GB_per_s']:>8.0f} {100 * record['share_of_copy']:>7.0f} %"
        )
    return "\n".join(lines)


def tiny() -> int:
    """Part 4 on little, and the column loop's kernel where it runs: in Triton's interpreter too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" or triton.knobs.runtime.interpret:
        if wrong := gpu_blocks.loop_misses(device, 20, 64):
            print(*wrong, sep="\n", file=sys.stderr)
            return 1
        print("the column loop agrees with torch's operations", file=sys.stderr)
    tokens = gpu_blocks.random_tokens(2, 64)
    print(gpu_blocks.table(list(gpu_blocks.blocks(gpu_blocks.TINY, device, tokens, 32))))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, two sizes, 4 layers")
    parser.add_argument("--only", choices=("products", "decoding", "blocks"), help="one part")
    parser.add_argument("--tiny", action="store_true", help="whether blocks run; here, and tiny")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of records")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.tiny:
        return tiny()
    if not torch.cuda.is_available():
        print("bench/gpu.py needs an NVIDIA GPU, and there is none here", file=sys.stderr)
        return 2

    with untuned():
        wrong = misses("cuda", 1000, 1536, (1, FEW, 16, 33, 65, MANY + 1))
    wrong += gpu_blocks.loop_misses("cuda", 1000, 1536)
    if wrong:
        print("\n".join(wrong[:20]), f"{len(wrong)} cases are wrong", sep="\n", file=sys.stderr)
        return 1
    print("every kernel agrees", file=sys.stderr)

    bandwidth = copy_bandwidth()
    record = {
        **machine(),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "quick": args.quick,
        "copy_GB_per_s": round(bandwidth / 1e9, 1),
        "groupsize": GROUPSIZE,
    }
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    if args.only in (None, "products"):
        grid = (SHAPES[:1], BITS[:1], (1, 16)) if args.quick else (SHAPES, BITS, TOKENS)
        record["products"] = products(*grid, bandwidth)
        print(table(record["products"]))
    if args.only in (None, "decoding"):
        layers = 4 if args.quick else 32
        record["tokens_per_second"] = rates = decoding(llama(layers), "cuda", NEW)
        torch.cuda.empty_cache()
        print(
            f"decoding, {layers} layers of Llama 3 8B's shape, batch 1:"
            f" bfloat16 {rates['dense']:.1f} tokens/s, 4 bits {rates['ours']:.1f},"
            f" ratio {rates['ratio']:.2f}"
        )
    if args.only in (None, "blocks"):
        record["blocks"] = gpu_blocks.measured(args.quick)
        print(gpu_blocks.table(record["blocks"]))
    append(args.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
