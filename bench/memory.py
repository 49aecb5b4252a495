"""Memory of a run on a mixture of experts, beside the sizes that bound it.

A Qwen3-MoE with random weights whose experts are nearly all of it, made in a temporary folder, is
quantized to 4 bits with a little text, in a process of its own that samples what it holds:
anonymous memory, and all that is resident, which counts pages of mapped files that the system may
drop. Both are above the imported libraries.

    python bench/memory.py                       appends a record to bench/results/memory.jsonl
    python bench/memory.py --before CHECKOUT     sets another commit beside this one
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from machine import append, machine

BENCH = Path(__file__).parent
RESULTS = BENCH / "results" / "memory.jsonl"
BLOCKS, EXPERTS, HIDDEN, INNER = 8, 8, 1024, 1024
SAMPLES, SEQLEN = 2, 32
KINDS = {"anonymous": "RssAnon", "resident": "VmRSS"}  # in /proc/self/status, in kB


def make(folder: Path) -> None:
    """The model, saved as transformers saves it: one tensor for each projection of each expert."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **{"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_hidden_layers": BLOCKS},
        **{"num_experts": EXPERTS, "num_experts_per_tok": 8, "vocab_size": 1024, "head_dim": 64},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024},
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def now() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {kind: int(values[field].split()[0]) / 1e6 for kind, field in KINDS.items()}


@contextmanager
def watched(peak: dict[str, float]) -> Iterator[None]:
    """Inside, what this process holds at most goes into ``peak``, by kind, in GB."""
    done = threading.Event()
    peak.update(dict.fromkeys(KINDS, 0.0))

    def sample() -> None:
        while not done.wait(0.005):
            peak.update({kind: max(peak[kind], value) for kind, value in now().items()})

    watch = threading.Thread(target=sample)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def run(folder: str, method: str) -> None:
    """Quantize, and print what it took, in GB."""
    import torch

    from optq import GPTQ, RTN, ModelConfig, Runner

    tokens = torch.randint(1024, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))
    quantizer = {"rtn": RTN, "gptq": GPTQ}[method](4, 128)
    form, out = "compressed-tensors", f"{folder}-out"
    runner = Runner(ModelConfig(folder, "cpu"), quantizer, calib=tokens, format=form, output=out)
    before, peak, start = now(), dict[str, float](), time.perf_counter()
    with watched(peak):
        result = runner.run()
    seconds = time.perf_counter() - start
    found = {kind: round(peak[kind] - before[kind], 3) for kind in KINDS}
    found |= {"seconds": round(seconds, 1), "load_seconds": round(result.seconds["load"], 1)}
    print(json.dumps(found | {"packed": round(result.bytes / 1e9, 3)}))


def measure(folder: Path, method: str, source: Path) -> dict[str, float]:
    paths = os.pathsep.join([str(source / "src"), str(BENCH)])
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / "model"  # the output lies beside it
        link.symlink_to(folder)
        command = (sys.executable, __file__, "--child", link, "--method", method)
        environment = os.environ | {"PYTHONPATH": paths}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--method", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run(given.child, given.method)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make(folder)
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        block = 2 * (EXPERTS * 3 * HIDDEN * INNER) / 1e9
        record: dict[str, object] = machine() | {
            "model": f"qwen3_moe, {BLOCKS} blocks of {EXPERTS} experts of {HIDDEN} x {INNER}",
            "method": given.method,
            "tokens": SAMPLES * SEQLEN,
            "dense_gb": round(sum(sizes) / 1e9, 3),
            "experts_of_a_block_gb": round(block, 3),
        }
        runs = {"now": BENCH.parent} | ({"before": given.before} if given.before else {})
        for name, source in runs.items():
            found = measure(folder, given.method, source)
            record["packed_gb"] = packed = found.pop("packed")
            found["anonymous_above_packed"] = round(found["anonymous"] - packed, 3)
            record[name] = found
            print(f"{name:8} {found}")
    append(RESULTS, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
