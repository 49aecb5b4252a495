"""A model larger than the memory that a run may take, and what that costs in time.

A Llama of hidden size 2048 with random bfloat16 weights, written shard by shard. With ``--blocks
58`` its checkpoint has 6 GB; the run may take ``--limit`` GB beyond what the imported libraries
have: it is put into a memory control group of that size when they are loaded, pages of files
included, or where there is none under RLIMIT_DATA. What it has resident is sampled.

    python bench/large.py --plain                     appends a record to bench/results/large.jsonl
    python bench/large.py --blocks 4 --limit 0 --before CHECKOUT --runs 3
                         beside a commit that has the whole model in memory, on one that fits
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import append, machine
from memory import KINDS, now, watched

BENCH = Path(__file__).parent
RESULTS = BENCH / "results" / "large.jsonl"
HIDDEN, INNER, VOCABULARY = 2048, 5632, 16000
SAMPLES, SEQLEN = 8, 512


def make(folder: Path, blocks: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": blocks},
        **{"vocab_size": VOCABULARY, "num_attention_heads": 16, "num_key_value_heads": 16},
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        layout = LlamaForCausalLM(config).state_dict()
    generator, shards = torch.Generator().manual_seed(0), {}
    for name, tensor in layout.items():
        index = int(name.split(".")[2]) + 1 if ".layers." in name else 0
        shards.setdefault(index, []).append((name, tensor))
    files = {}
    for index, tensors in shards.items():
        made = {
            name: torch.randn(tensor.shape, generator=generator).mul_(0.02).bfloat16()
            if tensor.ndim > 1
            else torch.ones(tensor.shape).bfloat16()
            for name, tensor in tensors
        }
        file = f"model-{index:05}.safetensors"
        save_file(made, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(made, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def confine(size: int) -> str:
    """Let this process take so many bytes more; what is there already does not count."""
    import resource

    group = Path("/sys/fs/cgroup/memory/optq-bench")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(size))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        return "cgroup"
    except OSError:
        lines = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) * 1000 for line in lines if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + size,) * 2)
        return "RLIMIT_DATA"


def run(folder: str, out: str, limit: float, plain: bool) -> None:
    """Quantize, and print what it took."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from optq import GPTQ, ModelConfig, Runner

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (SAMPLES, SEQLEN), generator=generator)
    before, peak = now(), dict[str, float]()
    by = confine(int(limit * 1e9)) if limit else None
    quantizer = GPTQ.plain(4, 128) if plain else GPTQ(4, 128)
    runner = Runner(ModelConfig(folder, "cpu"), quantizer, not plain, tokens, out)
    start = time.perf_counter()
    with watched(peak):
        result = runner.run()
    seconds = time.perf_counter() - start
    found = {kind: round(peak[kind] - before[kind], 3) for kind in KINDS}
    phases = {name: round(value, 1) for name, value in result.seconds.items()}
    found |= {"confined_by": by, "seconds": round(seconds, 1), "phases": phases}
    print(json.dumps(found))


def once(model: Path, source: Path, limit: float, plain: bool) -> dict[str, float]:
    paths = os.pathsep.join([str(source / "src"), str(BENCH)])
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        command = (sys.executable, __file__, "--child", model, Path(scratch) / "out")
        environment = os.environ | {"PYTHONPATH": paths}
        command += ("--limit", str(limit), *(("--plain",) if plain else ()))
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=58)
    parser.add_argument("--limit", type=float, default=2.0, help="GB; 0: none")
    parser.add_argument("--plain", action="store_true", help="the paper's GPTQ, one stream")
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run(*given.child, given.limit, given.plain)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        make(folder, given.blocks)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        record: dict[str, object] = machine() | {
            "model": f"llama, {given.blocks} blocks of {HIDDEN} x {INNER}",
            "checkpoint_gb": round(size, 2),
            "limit_gb": given.limit,
            "method": "plain" if given.plain else "default, error propagation",
            "tokens": f"{SAMPLES} x {SEQLEN}",
        }
        sources = {"now": BENCH.parent} | ({"before": given.before} if given.before else {})
        runs: dict[str, list[dict]] = {name: [] for name in sources}
        for _ in range(given.runs):
            for name, source in sources.items():
                runs[name].append(once(folder, source.resolve(), given.limit, given.plain))
                print(f"{name:8} {runs[name][-1]}", flush=True)
    record |= runs
    if given.before:
        pairs = zip(runs["now"], runs["before"], strict=True)
        record["ratio"] = round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3)
    append(RESULTS, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
