"""Held-out perplexity of pruned models: ``python bench/pruning.py MODEL...``.

Models, tokens, windows and ``--choosing`` are those of ``bench/quality.py``. At 50% and at 2:4
every method prunes the same model on the same tokens; what counts is the rise over full precision,
beside magnitude's and Wanda's. Then the same with what stays in 4 bits, groups of 128: ``joint`` in
one run; ``then`` prunes the model, and quantizes the pruned one in a second run that leaves its
zeros where they are. ``plain`` is the paper's SparseGPT, ``no-qep`` ours without error propagation.
``--llmcompressor PYTHON``, of an environment that has it, adds its SparseGPT on the same tokens;
its ``seconds`` are without loading and saving, ours with.

Appends one record a run to bench/results/pruning.jsonl, skips what is there already, and prints
the table.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import quality_peers
from machine import append, machine
from quality import (
    CHOOSING,
    FINAL,
    SAMPLES,
    SEQLEN,
    choosing,
    divergence,
    final,
    groupsize,
    label,
    texts,
)

import optq
from optq import Magnitude, ModelConfig, Runner, SparseGPT, Wanda
from optq.core.rounding import working_copy
from optq.data.calibration import calibration_tokens
from optq.data.evaluation import evaluation_tokens
from optq.evaluate.perplexity import perplexity
from optq.model.blocks import find_blocks

RESULTS = Path(__file__).parent / "results" / "pruning.jsonl"
SPARSITIES = (0.5, "2:4")
WBITS = 4


class ZerosStay(SparseGPT):
    """Quantize a pruned weight: its zeros are what is removed."""

    def _solve_together(self, problems, weights, aims, storage):
        originals = [working_copy(weight) for weight in weights]
        keeps = [W != 0 for W in originals]
        targets = [
            working_copy(weight if aim is None else aim) * keep
            for weight, aim, keep in zip(weights, aims, keeps, strict=True)
        ]
        sweep = self._sweep(self.grid, problems, targets, keeps, storage)
        each = enumerate(zip(problems, originals, strict=True))
        return [self._coded(sweep, index, *pair, storage) for index, pair in each]


# name -> (pruner of a sparsity and the size of groups, error propagation, whether there are codes)
VARIANTS = {
    "magnitude": (lambda s, g: Magnitude(s), False, False),
    "wanda": (lambda s, g: Wanda(s), False, False),
    "plain": (lambda s, g: SparseGPT.plain(s), False, False),
    "no-qep": (lambda s, g: SparseGPT(s), False, False),
    "sparsegpt": (lambda s, g: SparseGPT(s), True, False),
    "joint plain": (lambda s, g: SparseGPT.plain(s, WBITS, groupsize=g, mse=True), True, True),
    "joint": (lambda s, g: SparseGPT(s, WBITS, g), True, True),
    "then": (lambda s, g: ZerosStay(s, WBITS, g), True, True),
}


def pruned(model: str, variant: str, sparsity, group: int, seed: int):
    """The model as a variant makes it, and the mean sparsity of its layers."""
    build, qep, _ = VARIANTS[variant]
    options = {"calib": texts(model)[0], "nsamples": SAMPLES, "seqlen": SEQLEN, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        source = model
        if variant == "then":
            source = str(Path(scratch) / "pruned")
            Runner(
                ModelConfig(model, "cpu"), SparseGPT(sparsity), True, output=source, **options
            ).run()
        result = Runner(ModelConfig(source, "cpu"), build(sparsity, group), qep, **options).run()
    zeros = sum(layer.sparsity * layer.rows * layer.cols for layer in result.layers)
    return result.model, zeros / sum(layer.rows * layer.cols for layer in result.layers)


def of_llmcompressor(python: str, model: str, tokenizer, sparsity, seed: int):
    """The model as llm-compressor's SparseGPT leaves it, its layers' sparsity, and its seconds."""
    tokens = calibration_tokens(texts(model)[0], tokenizer, SAMPLES, SEQLEN, seed)
    folder = ModelConfig(model, "cpu").checkpoint().folder
    with tempfile.TemporaryDirectory() as scratch:
        how = folder, tokens, WBITS, Path(scratch)
        ran = quality_peers.run(python, "llmcompressor", f"sparsegpt-{sparsity}", *how)
        if ran.returncode:
            raise SystemExit(ran.stderr[-2000:])
        made = optq.load(Path(scratch) / "out", "cpu")
    weights = [layer.weight for block in find_blocks(made) for layer in block.layers]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    seconds = json.loads(ran.stdout.splitlines()[-1])["quantize_seconds"]
    return made, zeros / sum(weight.numel() for weight in weights), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="Python that has llm-compressor")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choosing", action="store_true", help="on other windows than the final")
    parser.add_argument("--windows", type=int, default=FINAL, help="of the final ones")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    part = choosing if arguments.choosing else partial(final, count=arguments.windows)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    done = {key_of(row): row for row in map(json.loads, lines)}
    names = arguments.variants.split(",") + ["llm-compressor"] * bool(arguments.llmcompressor)
    for model in arguments.models:
        loaded, tokenizer = ModelConfig(model, "cpu").load()
        windows = part(evaluation_tokens(texts(model)[1], tokenizer, SEQLEN))
        runs = [("none", 0, 0)]
        runs += [(v, s, i) for i in range(arguments.seeds) for s in SPARSITIES for v in names]
        for run in runs:
            key = (label(model), *run)
            if key in done:
                continue
            variant, sparsity, seed = run
            row = dict(zip(("model", "variant", "sparsity", "seed"), key, strict=True))
            start, quantized = time.perf_counter(), loaded
            if variant != "none":
                if variant == "llm-compressor":
                    how = arguments.llmcompressor, model, tokenizer, sparsity, seed
                    quantized, zeros, seconds = of_llmcompressor(*how)
                else:
                    quantized, zeros = pruned(model, variant, sparsity, groupsize(loaded), seed)
                    seconds = time.perf_counter() - start
                row |= {"zeros": round(zeros, 5), "seconds": round(seconds, 1)}
                row["divergence"] = round(divergence(loaded, quantized, windows[:CHOOSING]), 4)
            row["perplexity"] = round(perplexity(quantized, windows).perplexity, 5)
            done[key] = row
            append(arguments.results, row | machine())
        for sparsity in SPARSITIES:
            print_table(done, label(model), sparsity, names, arguments.seeds)


def key_of(row: dict) -> tuple:
    return row["model"], row["variant"], row["sparsity"], row["seed"]


def print_table(done, model: str, sparsity, names: list[str], seeds: int) -> None:
    """Mean rises, and their shares of magnitude's and Wanda's."""
    full = done[model, "none", 0, 0]["perplexity"]
    print(f"{model}, {sparsity}, full precision {full:.3f}, {seeds} seeds")

    def mean(variant: str, what: str) -> float:
        rows = [done.get((model, variant, sparsity, seed)) for seed in range(seeds)]
        found = [row[what] for row in rows if row]
        return sum(found) / len(found) if found else float("nan")

    for variant in names:
        rise = mean(variant, "perplexity") - full
        shares = [rise / (mean(other, "perplexity") - full) for other in ("magnitude", "wanda")]
        line = f"  {variant:14} rise {rise:+9.3f}  of magnitude's {shares[0]:.3f}  of Wanda's"
        line += f" {shares[1]:.3f}  divergence {mean(variant, 'divergence'):9.3f}"
        print(f"{line}  zeros {mean(variant, 'zeros'):.4f}", flush=True)


if __name__ == "__main__":
    main()
