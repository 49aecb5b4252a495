"""Budgets beside uniform widths: ``python bench/budget.py MODEL...``, as ``bench/quality.py``.

For each model and seed the uniform widths 2, 3 and 4 and runs within a budget are quantized on the
same tokens, in groups of ``--groupsize``, with error propagation. What a budget is worth is its
divergence as a share of the line between the neighbouring uniform widths: straight in the logarithm
of the divergence over the bits per weight as stored, scales and all. Divergence is measured on the
windows that ``bench/quality.py`` reports on; with ``--choosing`` on those that choices are made on.

Appends one record a run to bench/results/budget.jsonl, skips what is there already, and prints the
table.
"""

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

from quality import CHOOSING, SAMPLES, SEQLEN, choosing, divergence, final, label, texts

from optq import GPTQ, Mixed, ModelConfig, Runner
from optq.data.evaluation import evaluation_tokens

RESULTS = Path(__file__).parent / "results" / "budget.jsonl"
UNIFORM = (2, 3, 4)


def line(bits: float, rows: list[dict]) -> float:
    """The divergence at ``bits`` per weight between the uniform widths' ``rows``."""
    points = [(row["bits"], math.log(row["divergence"])) for row in rows]
    (a, low), (b, high) = next(p for p in pairwise(points) if bits <= p[1][0])
    return math.exp(low + (high - low) * (bits - a) / (b - a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--budgets", default="2.5,3.25,3.5")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--groupsize", type=int, default=128)
    parser.add_argument("--choosing", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    done, keys = {}, ("model", "windows", "groupsize", "kind", "seed")
    if arguments.results.exists():
        for text in arguments.results.read_text().splitlines():
            row = json.loads(text)
            done[tuple(row[key] for key in keys)] = row
    part = choosing if arguments.choosing else final
    groupsize, budgets = arguments.groupsize, list(map(float, arguments.budgets.split(",")))
    for model in arguments.models:
        config, (calib, text) = ModelConfig(model, "cpu"), texts(model)
        full, tokenizer = config.load()
        windows = part(evaluation_tokens(text, tokenizer, SEQLEN))[:CHOOSING]
        quantizers = {f"{wbits} bits": GPTQ(wbits, groupsize) for wbits in UNIFORM}
        quantizers |= {f"budget {b:g}": Mixed(b, groupsize=groupsize) for b in budgets}
        for seed in range(arguments.seeds):
            found = {}
            for kind, quantizer in quantizers.items():
                key = (label(model), part.__name__, groupsize, kind, seed)
                if key not in done:
                    start = time.perf_counter()
                    options = {"calib": calib, "nsamples": SAMPLES, "seqlen": SEQLEN, "seed": seed}
                    result = Runner(config, quantizer, True, **options).run()
                    row = dict(zip(keys, key, strict=True)) | {"bits": result.bits_per_weight}
                    row["divergence"] = round(divergence(full, result.model, windows), 4)
                    if result.choices is not None:
                        row["widths"] = {x.layers[0]: x.wbits for x in result.choices}
                    row["seconds"] = round(time.perf_counter() - start, 1)
                    done[key] = row
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                found[kind] = row = done[key]
                print(
                    f"{label(model)}, seed {seed}, {kind}: {row['bits']:.4f} bits per weight,",
                    end="",
                )
                print(f" divergence {row['divergence']:.3f}", end="", flush=True)
                if kind.startswith("budget"):
                    asked = float(kind.split()[1])
                    between = line(row["bits"], [found[f"{wbits} bits"] for wbits in UNIFORM])
                    share = row["divergence"] / between
                    print(
                        f", {share:.3f} of the line, {row['bits'] / asked:.4f} of the budget",
                        end="",
                    )
                print(flush=True)


if __name__ == "__main__":
    main()
