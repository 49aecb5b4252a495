"""What `optq eval --against` costs beside perplexity alone, on the bundled model at 4 bits.

The command is run as a user runs it, once without --against and once with it, in turns. Wall time
is of the whole command, imports included; ``cpu`` is what its process computed, which a busy
machine moves less. The parts are timed in one process, in turns as well: one pass for perplexity,
one pass of the dense model up to its head, and one beside what was kept of it; and what they are
beside plain float64 arithmetic on some windows.

    python bench/evaluate.py         appends a record to bench/results/evaluate.jsonl
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

RESULTS = Path(__file__).parent / "results" / "evaluate.jsonl"


def command(*words: object) -> tuple[float, float, dict]:
    """Wall and CPU seconds of `optq ..`, and what it printed."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "optq", *map(str, words)], check=True, stdout=subprocess.PIPE
    )
    wall, after = time.perf_counter() - start, os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return wall, cpu, json.loads(done.stdout)


def parts(folder: Path, runs: int, windows_in_float64: int) -> dict[str, object]:
    """CPU seconds of each pass, and how far the numbers are from float64's."""
    import torch

    from optq.config import ModelConfig
    from optq.data.evaluation import evaluation_tokens
    from optq.evaluate.divergence import divergence
    from optq.evaluate.perplexity import perplexity
    from optq.model.predictions import predictions

    model, tokenizer = ModelConfig(str(folder), "cpu").load()
    windows = evaluation_tokens("demo", tokenizer, 512)
    seconds: dict[str, list[float]] = {"perplexity": [], "dense pass": [], "beside": []}

    def timed(name, act):
        start = time.process_time()
        made = act()
        seconds[name].append(time.process_time() - start)
        return made

    perplexity(model, windows[:16])  # warm
    for _ in range(runs):
        timed("perplexity", lambda: perplexity(model, windows))
        dense = ModelConfig("demo", "cpu").load()[0]
        (kept,) = timed("dense pass", lambda dense=dense: predictions(dense, [windows]))
        timed("beside", lambda kept=kept: divergence(model, kept, windows))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    some = windows[:windows_in_float64]
    found = divergence(model, kept, some)
    with torch.no_grad():
        dense = ModelConfig("demo", "cpu").load()[0]
        q, p = (each(input_ids=some).logits[:, :-1].double() for each in (model, dense))
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    ratio = (medians["dense pass"] + medians["beside"]) / medians["perplexity"]
    return {
        "cpu_seconds": {name: round(value, 2) for name, value in medians.items()},
        "passes_ratio": round(ratio, 2),
        "divergence": found.mean,
        "relative_error_of_divergence": abs(found.mean / kl.mean().item() - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    record: dict[str, object] = machine() | {"model": "demo, 4 bits, groups of 128", "runs": runs}
    record["threads"] = os.environ.get("OMP_NUM_THREADS", "all")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command("quantize", "demo", out, "--nsamples", 16, "--device", "cpu", "--json")
        options = ("eval", out, "--text", "demo", "--device", "cpu", "--json")
        wall: dict[str, list[float]] = {"alone": [], "against": []}
        cpu: dict[str, list[float]] = {"alone": [], "against": []}
        for _ in range(runs):
            for name, more in (("alone", ()), ("against", ("--against", "demo"))):
                seconds, computed, found = command(*options, *more)
                wall[name].append(seconds)
                cpu[name].append(computed)
                print(f"{name:8} {seconds:6.1f} s, {computed:6.1f} s computed", flush=True)
        record["found"] = {key: found[key] for key in ("perplexity", "against")}
        record |= parts(out, runs, 8)
    for name, each in (("wall", wall), ("cpu", cpu)):
        median = {key: round(statistics.median(values), 1) for key, values in each.items()}
        record[name] = median | {"ratio": round(median["against"] / median["alone"], 2)}
    append(RESULTS, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
