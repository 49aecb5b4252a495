"""Two processes with one thread each beside one process with two threads, on the same work.

The 61-million-parameter Llama of ``bench/model.py``, 32 x 512 tokens, the default settings with
error propagation. The two take turns; compared are medians of the seconds of a run, without loading
and writing, and the bytes of the checkpoints. ``--processes 4 --threads 1`` sets others against
``4 x 1`` threads. What each process sent, by site, stands beside the least that could be sent:

* sums: a matrix that starts at one process and ends at the last passes each of the others once,
  ``(P - 1) n (n + 1) / 2`` numbers of ``X X^T``, and ``(P - 1) n^2`` of the drift;
* finished sums: as much, since each process but one needs all of it;
* solutions: each row's codes, scales and the like to ``P - 1`` processes.

Appends one record to bench/results/ranks.jsonl and prints a table.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import append, machine
from model import build

RESULTS = Path(__file__).parent / "results" / "ranks.jsonl"


def work(checkpoint: str, tokens: str, out: str, told: str) -> None:
    """One run, in one of the processes; what it took and sent goes to a file."""
    import torch

    from optq import GPTQ, ModelConfig, Runner

    calib = torch.load(tokens)
    config, solver = ModelConfig(checkpoint, "cpu"), GPTQ(wbits=4, groupsize=128)
    result = Runner(config, solver, qep=True, calib=calib, output=out).run()
    rank = os.environ.get("RANK", "0")
    columns = {layer.name: [layer.rows, layer.cols] for layer in result.layers}
    sent = [[*key, count] for key, count in result.sent.items()]
    record = {"seconds": result.seconds, "sent": sent, "columns": columns}
    Path(f"{told}.{rank}").write_text(json.dumps(record))


def run_once(processes: int, threads: int, checkpoint: Path, tokens: Path) -> dict:
    """Seconds without loading and writing, the checkpoint's hash, and what all have sent."""
    with tempfile.TemporaryDirectory() as scratch:
        out, told = Path(scratch) / "out", Path(scratch) / "told"
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc-per-node={processes}"]
        command = [*launch, __file__, "--work", *map(str, (checkpoint, tokens, out, told))]
        subprocess.run(
            command,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
        )
        records = [json.loads(Path(f"{told}.{rank}").read_text()) for rank in range(processes)]
        seconds = records[0]["seconds"]
        digest = hashlib.sha256()
        for path in sorted({*out.rglob("*")} - {*out.rglob("optq_times.json")}):
            if path.is_dir():
                continue
            digest.update(path.name.encode() + path.read_bytes())
    sent: dict[str, dict[str, int]] = {}
    for site, what, count in (each for record in records for each in record["sent"]):
        if site:
            sent.setdefault(site, {}).setdefault(what, 0)
            sent[site][what] += count
    return {
        "seconds": seconds["total"] - seconds["load"] - seconds["write"],
        "stages": seconds,
        "hash": digest.hexdigest(),
        "sent": sent,
        "columns": records[0]["columns"],
    }


def least(columns: int, processes: int) -> int:
    """Bytes of the sums of one site that cannot be saved, on their way there or back."""
    return 4 * (processes - 1) * (columns * (columns + 1) // 2 + columns**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="record nothing")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="keeps the model")
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    checkpoint, tokens = build(args.cache.resolve())
    kinds = {
        "one": (1, args.processes * args.threads),
        "several": (args.processes, args.threads),
    }
    record, runs = machine(), {name: [] for name in kinds}
    for _ in range(args.runs):
        for name, (processes, threads) in kinds.items():
            runs[name].append(run := run_once(processes, threads, checkpoint, tokens))
            print(f"{name}: {run['seconds']:.2f} s", file=sys.stderr)
    medians = {name: statistics.median(r["seconds"] for r in each) for name, each in runs.items()}
    last = runs["several"][-1]
    sites = {
        site: {**sent, "least sums": least(last["columns"][site][1], args.processes)}
        for site, sent in last["sent"].items()
        if site in last["columns"]
    }
    same = len({run["hash"] for each in runs.values() for run in each}) == 1
    speed = medians["one"] / medians["several"]
    record |= {"kinds": kinds, "median": medians, "speed": round(speed, 3), "same bytes": same}
    record |= {
        "seconds": {name: [round(r["seconds"], 3) for r in each] for name, each in runs.items()},
        "stages": {name: each[-1]["stages"] for name, each in runs.items()},
        "sent": sites,
    }
    if not args.dry:
        append(RESULTS, record)
    print(f"{args.processes} processes: {speed:.3f} of the speed of one with as many threads")
    print("the same bytes" if same else "OTHER BYTES")
    for site, sent in sites.items():
        print(site, {what: f"{count / 1e6:.2f} MB" for what, count in sent.items()})


if __name__ == "__main__":
    main()
