"""A plan beside the run that it foretells: memory at the peak, bytes of the result, and time.

Random models, made in a temporary folder: the 61-million-parameter Llama of ``bench/model.py``, the
mixture of experts of ``bench/memory.py``, and a Llama of hidden size 2048 with few blocks. Each is
planned and then quantized in a process of its own that samples its anonymous memory, which is what
is above what it had when the run began; the plan's is compared without the libraries.

    python bench/plan.py [--models llama experts wide] [--method gptq]

appends a record to bench/results/plan.jsonl. Times mean something on a quiet machine only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import memory
from machine import append, machine
from model import build

RESULTS = Path(__file__).parent / "results" / "plan.jsonl"
TOKENS = {"llama": (32, 512), "experts": (4, 128), "wide": (8, 512)}  # samples, and their length


def wide(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128000},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def llama(folder: Path) -> None:
    found, _ = build(folder.parent / "cache", "llama")
    folder.symlink_to(found)


MODELS: dict[str, Callable[[Path], None]] = {"llama": llama, "experts": memory.make, "wide": wide}


def run(folder: str, name: str, method: str) -> None:
    """Plan and quantize, and print what was foretold and what was, in GB and seconds."""
    import torch

    from optq import GPTQ, RTN, ModelConfig, Runner
    from optq.machine import resident

    samples, seqlen = TOKENS[name]
    tokens = torch.randint(1000, (samples, seqlen), generator=torch.Generator().manual_seed(0))
    quantizer = {"rtn": RTN, "gptq": GPTQ, "plain": GPTQ.plain}[method](4, 128)
    out = f"{folder}-out"
    runner = Runner(ModelConfig(folder, "cpu"), quantizer, method == "gptq", tokens, out)
    start = time.perf_counter()
    plan, libraries = runner.plan(), resident()
    planned, before, peak = time.perf_counter() - start, memory.now(), dict[str, float]()
    start = time.perf_counter()
    with memory.watched(peak):
        result = runner.run()
    seconds = time.perf_counter() - start
    foretold, found = (plan.memory - libraries) / 1e9, peak["anonymous"] - before["anonymous"]
    record = {
        "memory_foretold": round(foretold, 3),
        "memory": round(found, 3),
        "ratio": round(foretold / found, 3),
        "with_libraries": round((foretold + libraries / 1e9) / (found + libraries / 1e9), 3),
        "bytes_foretold": plan.packed_bytes,
        "bytes": result.bytes,
        "seconds_foretold": round(plan.seconds, 1),
        "seconds": round(seconds, 1),
        "stages": {name: round(value, 1) for name, value in result.seconds.items()},
        "seconds_to_plan": round(planned, 2),
    }
    print(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--method", choices=("gptq", "plain", "rtn"), default="gptq")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run(*given.child, given.method)
        return
    for name in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            MODELS[name](folder)
            command = (sys.executable, __file__, "--child", folder, name, "--method", given.method)
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        samples, seqlen = TOKENS[name]
        what = {"model": name, "method": given.method, "tokens": f"{samples} x {seqlen}"}
        record = machine() | what | json.loads(output.splitlines()[-1])
        append(RESULTS, record)
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
