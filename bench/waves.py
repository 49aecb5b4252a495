"""A run that may hold an eighth of what its batches hold, beside one that may hold all.

The 61-million-parameter Llama of ``bench/model.py``, 32 x 512 tokens, the default settings with
error propagation, which runs two streams. Runs take turns, each in a process of its own; the two
checkpoints are compared byte for byte.

    python bench/waves.py --runs 5           appends a record to bench/results/waves.jsonl
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import append, machine
from model import build

BENCH = Path(__file__).parent
RESULTS = BENCH / "results" / "waves.jsonl"
SHARE = 8


def run(model: str, tokens: str, out: str, memory: int | None) -> None:
    import torch

    from optq import GPTQ, ModelConfig, Runner

    result = Runner(
        ModelConfig(model, "cpu"),
        GPTQ(4, 128),
        qep=True,
        calib=torch.load(tokens),
        output=out,
        activation_memory=memory,
    ).run()
    print(json.dumps({"seconds": result.seconds, "held": result.activations}))


def once(checkpoint: Path, tokens: Path, memory: int | None) -> tuple[dict, str]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        given = ("--child", checkpoint, tokens, out, str(memory))
        process = subprocess.run(
            (sys.executable, __file__, *given), check=True, stdout=subprocess.PIPE
        )
        digest = hashlib.sha256()
        for path in sorted({*out.iterdir()} - {out / "optq_times.json"}):
            digest.update(path.name.encode() + path.read_bytes())
    return json.loads(process.stdout.splitlines()[-1]), digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="keeps the model")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        *paths, memory = given.child
        run(*paths, None if memory == "None" else int(memory))
        return
    checkpoint, tokens = build(given.cache.resolve())
    record, before = machine(), once(checkpoint, tokens, None)
    share = before[0]["held"]["memory"] // SHARE
    runs: dict[str, list[float]] = {"all": [], "share": []}
    held, digests = {}, {before[1]}
    for _ in range(given.runs):
        for name, memory in (("all", None), ("share", share)):
            found, digest = once(checkpoint, tokens, memory)
            runs[name].append(round(found["seconds"]["total"], 2))
            held[name] = found["held"]
            digests.add(digest)
    ratio = statistics.median(b / a for a, b in zip(runs["all"], runs["share"], strict=True))
    record |= {"tokens": "32 x 512", "held": held, "seconds": runs}
    record |= {"ratio": round(ratio, 3), "identical": len(digests) == 1}
    append(RESULTS, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
