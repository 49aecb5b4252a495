"""Which calibration text, and how much of it: ``python bench/calibration.py``.

The bundled model (Python code) at 3 bits, groups of 128, the command's default with error
propagation, calibrated on

- ``code``: the held-out modules that ``demo`` names, of the kind that the model was trained on;
- ``english``: the language reference that ``help()`` prints (``pydoc_data.topics``), prose;
- ``mixed``: half of each;
- ``random``: tokens drawn evenly from the vocabulary;
- ``none``: round to nearest, for comparison;

by number of sequences, and at one number of tokens by their length. Perplexity and divergence from
full precision (millinats) are on 64 windows of 512 tokens of the evaluation text, which is code.
One thread; two seeds. Appends rows to bench/results/calibration.jsonl, skips those that are there,
and prints means. Seconds were taken beside other work on the machine: they are no claim.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from quality import divergence

from optq import GPTQ, RTN, ModelConfig, Runner
from optq.data.calibration import calibration_tokens
from optq.data.evaluation import evaluation_tokens
from optq.data.text import Text
from optq.evaluate.perplexity import perplexity

RESULTS = Path(__file__).parent / "results" / "calibration.jsonl"
WBITS, GROUPSIZE, SEQLEN, WINDOWS = 3, 128, 512, 64
RUNS = [("code", samples, SEQLEN) for samples in (8, 32, 128)]
RUNS += [("english", samples, SEQLEN) for samples in (8, 32, 128)]
RUNS += [("mixed", 32, SEQLEN), ("random", 32, SEQLEN), ("none", 1, SEQLEN)]
RUNS += [("code", 64, 256), ("code", 256, 64)]  # as many tokens as 32 of 512


def english() -> Text:
    from pydoc_data.topics import topics

    return Text("english", [topics[name] for name in sorted(topics)], "\n\n")


def tokens(text: str, samples: int, seqlen: int, seed: int, tokenizer: Any) -> torch.Tensor:
    """Calibration tokens, ``[samples, seqlen]``."""
    if text == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(tokenizer), (samples, seqlen), generator=generator)
    if text == "mixed":
        halves = (
            tokens(kind, samples // 2, seqlen, seed, tokenizer) for kind in ("code", "english")
        )
        return torch.cat(list(halves))
    spec = english() if text == "english" else "demo"
    return calibration_tokens(spec, tokenizer, samples, seqlen, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["text"], row["samples"], row["seqlen"], row["seed"]) for row in rows}
    loaded, tokenizer = ModelConfig("demo", "cpu").load()
    windows = evaluation_tokens("demo", tokenizer, SEQLEN)[:WINDOWS]
    full = perplexity(loaded, windows).perplexity
    for seed in range(arguments.seeds):
        for text, samples, seqlen in RUNS:
            if (text, samples, seqlen, seed) in done:
                continue
            start = time.perf_counter()
            ids = tokens(text, samples, seqlen, seed, tokenizer)
            solver = RTN(WBITS, GROUPSIZE) if text == "none" else GPTQ(WBITS, GROUPSIZE)
            config, qep = ModelConfig("demo", "cpu"), text != "none"
            runner = Runner(config, solver, qep=qep, calib=ids)
            quantized = runner.run().model
            row = {"text": text, "samples": samples, "seqlen": seqlen, "seed": seed}
            row["rise"] = round(perplexity(quantized, windows).perplexity - full, 4)
            row["divergence"] = round(divergence(loaded, quantized, windows), 3)
            row["seconds"] = round(time.perf_counter() - start, 1)
            rows.append(row)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    print(f"full precision {full:.3f}")
    for text, samples, seqlen in RUNS:
        own = [
            row
            for row in rows
            if (row["text"], row["samples"], row["seqlen"]) == (text, samples, seqlen)
        ]
        if own:
            rise, apart = (
                statistics.mean(row[name] for row in own) for name in ("rise", "divergence")
            )
            print(f"{text:8} {samples:4} x {seqlen:3}  rise {rise:+.3f}  divergence {apart:6.2f}")


if __name__ == "__main__":
    main()
