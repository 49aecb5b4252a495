"""What one token costs: bytes read and seconds, by batch size: ``python bench/traffic.py``.

A random Llama of 1B-class layers (hidden 2048, intermediate 8192, 8 layers, vocabulary 32000) in
bfloat16, and the same at 4 bits in groups of 128. One step of decoding is one forward pass of one
token for each sequence of the batch, with nothing before it to attend to: what is left is the
weights. The two models take turns; medians, on one thread. Beside them, from the same run: the
bytes per second that reading a long buffer reaches, and the operations per second of a large
bfloat16 product. ``read`` and ``multiply`` are what the step would take if it did only the one or
the other at that speed. Bytes are those of the tensors a step reads, not of a hardware counter.
Appends one record to bench/results/traffic.jsonl.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from decode import config, write
from machine import append, machine
from torch import nn

import optq
from optq.model.linear import QuantizedLinear, make_dense

RESULTS = Path(__file__).parent / "results" / "traffic.jsonl"
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bytes_read(model: Any, batch: int) -> int:
    """All that a step reads: every layer's weights whole, of the embedding a row a sequence."""
    embedding = model.get_input_embeddings().weight
    tensors = [*model.parameters(), *model.buffers()]
    rest = sum(each.nbytes for each in tensors if each is not embedding)
    return rest + batch * embedding.shape[1] * embedding.itemsize


def multiplications(model: Any) -> int:
    """Of weights and activations, for one token; an addition goes with each."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    return sum(layer.in_features * layer.out_features for layer in layers)


def memory_speed(runs: int) -> float:
    """Bytes per second of summing a buffer that no cache holds."""
    buffer = torch.ones(2**27)
    return buffer.nbytes / statistics.median(clock(buffer.sum) for _ in range(runs))


def product_speed(runs: int) -> float:
    """Operations per second of a bfloat16 product of 2048 x 2048 x 2048."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    return 2 * 2048**3 / statistics.median(clock(lambda: a @ b) for _ in range(runs + 1))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with TemporaryDirectory() as scratch:
        write(Path(scratch), config(2048, 8192, 8))
        packed = optq.load(scratch, "cpu")
    dense = copy.deepcopy(packed)
    make_dense(dense)
    models = {"bfloat16": dense, "4 bits": packed}
    work = 2 * multiplications(dense)
    speed, peak = memory_speed(arguments.runs), product_speed(arguments.runs)
    record: dict[str, Any] = {"bench": "traffic", **machine(), "threads": arguments.threads}
    record |= {"bytes_per_second": round(speed), "operations_per_second": round(peak), "rows": []}
    print(f"reads {speed / 1e9:.1f} GB/s, multiplies {peak / 1e9:.0f} GFLOP/s")
    for batch in BATCHES:
        ids = torch.randint(32000, (batch, 1))
        times: dict[str, list[float]] = {name: [] for name in models}
        for run in range(arguments.runs + 1):
            for name, model in models.items():
                took = clock(partial(model, input_ids=ids, use_cache=False))
                if run:  # the first warms up
                    times[name].append(took)
        for name, model in models.items():
            size, seconds = bytes_read(model, batch), statistics.median(times[name])
            row = {"batch": batch, "weights": name, "bytes": size, "seconds": round(seconds, 5)}
            row |= {"least": round(min(times[name]), 5), "most": round(max(times[name]), 5)}
            row |= {"read": round(size / speed, 5), "multiply": round(batch * work / peak, 5)}
            record["rows"].append(row)
            print(
                f"{batch:3} {name:9} {size / 1e9:.3f} GB  {1e3 * seconds:7.1f} ms"
                f"  read {1e3 * size / speed:6.1f}  multiply {1e3 * batch * work / peak:6.1f}"
                f"  {batch / seconds:6.1f} tokens/s",
                flush=True,
            )
    append(RESULTS, record)


if __name__ == "__main__":
    main()
