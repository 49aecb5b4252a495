"""Symmetric grids beside asymmetric ones: ``python bench/symmetric.py``.

The bundled model, groups of 128, 32 x 512 calibration tokens, by the paper's algorithm and by the
command's default, at 4, 3 and 2 bits. An asymmetric group keeps a zero point of its own. Rise of
perplexity and divergence from full precision (millinats) on the first 64 windows of the evaluation
text; one thread; two seeds. Appends rows to bench/results/symmetric.jsonl, skips those that are
there, and prints means.
"""

import argparse
import json
import statistics
from itertools import product
from pathlib import Path

import torch
from quality import divergence

from optq import GPTQ, ModelConfig, Runner
from optq.data.evaluation import evaluation_tokens
from optq.evaluate.perplexity import perplexity

RESULTS = Path(__file__).parent / "results" / "symmetric.jsonl"
GROUPSIZE, SAMPLES, SEQLEN, WINDOWS = 128, 32, 512, 64
KINDS = list(product(("plain", "default"), (4, 3, 2), (True, False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["method"], row["wbits"], row["sym"], row["seed"]) for row in rows}
    config = ModelConfig("demo", "cpu")
    loaded, tokenizer = config.load()
    windows = evaluation_tokens("demo", tokenizer, SEQLEN)[:WINDOWS]
    full = perplexity(loaded, windows).perplexity
    for seed in range(arguments.seeds):
        for method, wbits, sym in KINDS:
            if (method, wbits, sym, seed) in done:
                continue
            build, qep = (GPTQ.plain, False) if method == "plain" else (GPTQ, True)
            sizes = {"calib": "demo", "nsamples": SAMPLES, "seqlen": SEQLEN, "seed": seed}
            result = Runner(config, build(wbits, GROUPSIZE, sym), qep, **sizes).run()
            row = {"method": method, "wbits": wbits, "sym": sym, "seed": seed}
            row["bits_per_weight"] = round(result.bits_per_weight, 3)
            row["rise"] = round(perplexity(result.model, windows).perplexity - full, 4)
            row["divergence"] = round(divergence(loaded, result.model, windows), 3)
            rows.append(row)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    for kind in KINDS:
        own = [row for row in rows if (row["method"], row["wbits"], row["sym"]) == kind]
        if own:
            means = (statistics.mean(row[x] for row in own) for x in ("rise", "divergence"))
            print(kind, own[0]["bits_per_weight"], *(f"{mean:.3f}" for mean in means))


if __name__ == "__main__":
    main()
