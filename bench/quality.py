"""Held-out perplexity, paired over calibration seeds: ``python bench/quality.py MODEL...``.

A model is ``demo`` or a folder of ``bench/english.py`` or ``bench/smollm2.py`` (with
``calibration.txt`` and ``evaluation.txt``). For each model, number of bits and seed every variant
is quantized on the same tokens (64 windows of 512, as the demo; ``--samples``) and measured on the
same held-out text. What counts is the rise over full precision, as a share of plain GPTQ's
(``--of``: of another variant's) with the same seed: one number, its mean and its spread over seeds.
Groups are of 128 columns, of 64 where 128 does not divide the hidden size. The table also takes the
variants of ``bench/quality_peers.py``, of what is in the results.

Options were chosen with ``--choosing``, on the first windows of the held-out text; the numbers
that count come from later ones. A rise of half a percent is mostly luck, good or bad (the part of
the loss that is linear in the change of the weights), so the divergence of the predictions from
full precision's, in which that part is not, is measured too, on the first 64 windows. ``--windows``
measures both on fewer, of large models. ``--keep FOLDER`` leaves each checkpoint there, with the
seconds that its stages took, and goes on where a run was cut off.

Appends one record a run to bench/results/quality.jsonl, skips what is there already, and prints
the table.
"""

import argparse
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from optq import GPTQ, QEP, RTN, ModelConfig, Runner
from optq.data.evaluation import evaluation_tokens
from optq.evaluate.perplexity import perplexity

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
SEQLEN, SAMPLES, GROUPSIZE = 512, 64, 128
CHOOSING, FINAL = 64, 192  # windows of the held-out text


def gptq(**options):
    return partial(GPTQ.plain if options else GPTQ, **options)


STATIC = {"actorder": True, "static_groups": True}
# name -> (quantizer of (wbits, groupsize, sym), error propagation[, what is tuned afterwards])
VARIANTS = {
    "rtn": (RTN, False),
    "plain": (GPTQ.plain, False),
    "static": (gptq(static_groups=True), False),
    "actorder": (gptq(**STATIC), False),
    "group-order": (gptq(actorder="group"), False),
    "mse": (gptq(mse=True), False),
    "polish": (gptq(polish=1), False),
    "mse+static": (gptq(mse=True, **STATIC), False),
    "mse+group": (gptq(mse=True, actorder="group"), False),
    "mse+group+polish": (gptq(mse=True, actorder="group", polish=1), False),
    "mse+static+polish": (gptq(mse=True, polish=1, **STATIC), False),
    "mse+static+polish2": (gptq(mse=True, polish=2, **STATIC), False),
    "mse+static+polish+qep": (gptq(mse=True, polish=1, **STATIC), True),
    "mse+static+polish+qep1.0": (gptq(mse=True, polish=1, **STATIC), QEP(0.5, 1.0)),
    "polish0+qep": (gptq(mse=True, actorder="group"), True),
    "polish1+qep": (gptq(mse=True, actorder="group", polish=1), True),
    "polish2+qep": (gptq(mse=True, actorder="group", polish=2), True),
    "polish4+qep": (gptq(mse=True, actorder="group", polish=4), True),
    "polish1+qep1.0": (gptq(mse=True, actorder="group", polish=1), QEP(0.5, 1.0)),
    "polish1+qep1.0-last": (
        gptq(mse=True, actorder="group", polish=1),
        QEP(0.5, 1.0, r"down_proj|fc2"),
    ),
    "mse+group+polish2": (gptq(mse=True, actorder="group", polish=2), False),
    "mse+group+polish4": (gptq(mse=True, actorder="group", polish=4), False),
    "damp.001": (gptq(mse=True, actorder="group", polish=2, percdamp=0.001), False),
    "damp.1": (gptq(mse=True, actorder="group", polish=2, percdamp=0.1), False),
    "damp.1+qep": (gptq(mse=True, actorder="group", polish=2, percdamp=0.1), True),
    "damp.1+qep1.0": (gptq(mse=True, actorder="group", polish=2, percdamp=0.1), QEP(0.5, 1.0)),
    "damp.1+qep.1-alpha1": (
        gptq(mse=True, actorder="group", polish=2, percdamp=0.1),
        QEP(1.0, 0.1),
    ),
    "default": (gptq(), False),
    "default+qep": (gptq(), True),
    "default+qep-last": (gptq(), QEP(0.5, 0.01, r"down_proj|fc2")),
    "default+qep1.0": (gptq(), QEP(0.5, 1.0)),
    "default+qep-alpha1": (gptq(), QEP(1.0, 0.01)),
    "default+qep-alpha.75": (gptq(), QEP(0.75, 0.01)),
    "default+qep1.0-alpha1": (gptq(), QEP(1.0, 1.0)),
    "default+qep.1-alpha1": (gptq(), QEP(1.0, 0.1)),
    "default-mse+qep": (gptq(actorder="group", polish=2), True),
    "blocks": (gptq(), True, "blocks"),
    "model": (gptq(), True, "model"),
}
MEASURES = {
    "perplexity": lambda value, full: value - full,
    "divergence": lambda value, full: value,
}


def choosing(windows: torch.Tensor) -> torch.Tensor:
    return windows[:CHOOSING]


def final(windows: torch.Tensor, count: int = FINAL) -> torch.Tensor:
    """Spread evenly over what no choice was made on (the long texts' first 328 were looked at)."""
    rest = windows[328 if len(windows) > 500 else CHOOSING :]
    return rest[:: max(1, len(rest) // count)]


@torch.no_grad()
def divergence(full, quantized, windows: torch.Tensor) -> float:
    """Mean over positions of the Kullback-Leibler divergence of the predictions, in millinats."""
    total = 0.0
    for batch in windows.split(8):
        p, q = (m(batch).logits.float().log_softmax(-1) for m in (full, quantized))
        total += (p.exp() * (p - q)).sum().item()
    return 1e3 * total / windows.numel()


@torch.no_grad()
def split(full, quantized, rise: float, windows: torch.Tensor) -> dict[str, float]:
    """A rise (in nats) in what is square in the change of the weights and what is linear.

    From the rise at the weights mirrored through full precision's, ``2 W - Q``; in millinats.
    """
    weights, own = full.state_dict(), quantized.state_dict()
    for name, tensor in own.items():
        tensor.copy_(2 * weights[name] - tensor)
    other = perplexity(quantized, windows).nll - perplexity(full, windows).nll
    return {"square": round(500 * (rise + other), 3), "linear": round(500 * (rise - other), 3)}


def groupsize(model) -> int:
    return 64 if model.config.hidden_size % GROUPSIZE else GROUPSIZE


def read(results: Path) -> dict[tuple, dict]:
    """The rows of a results file by model, variant, bits and seed."""
    lines = results.read_text().splitlines() if results.exists() else []
    rows = map(json.loads, lines)
    return {(row["model"], row["variant"], row["wbits"], row["seed"]): row for row in rows}


def texts(model: str) -> tuple[str, str]:
    if model == "demo":
        return "demo", "demo"
    return str(Path(model) / "calibration.txt"), str(Path(model) / "evaluation.txt")


def label(model: str) -> str:
    return Path(model).name


def quantize(
    model: str,
    variant: str,
    wbits: int,
    seed: int,
    groupsize: int,
    samples: int = SAMPLES,
    output: Path | None = None,
):
    """The model as a variant makes it; ``output``: as it reads what it has written there."""
    build, qep, *tune = VARIANTS[variant]
    options = {"calib": texts(model)[0], "nsamples": samples, "seqlen": SEQLEN, "seed": seed}
    if tune:
        options["tune"] = tune[0]
    quantizer = build(wbits, groupsize, True)
    result = Runner(ModelConfig(model, "cpu"), quantizer, qep, output=output, **options).run()
    return ModelConfig(str(output), "cpu").load()[0] if output else result.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--of", default="plain", help="the variant whose shares are printed")
    parser.add_argument("--wbits", default="4,3,2")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--choosing", action="store_true", help="on other windows than the final numbers"
    )
    parser.add_argument("--split", action="store_true", help="rises into square and linear parts")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in their own results file")
    parser.add_argument("--windows", type=int, default=FINAL, help="of the final ones")
    parser.add_argument("--keep", type=Path, help="a folder for the checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = list(dict.fromkeys([arguments.of, *arguments.variants.split(",")]))
    part = choosing if arguments.choosing else partial(final, count=arguments.windows)
    done = read(arguments.results)
    for model in arguments.models:
        loaded, tokenizer = ModelConfig(model, "cpu").load()
        windows = part(evaluation_tokens(texts(model)[1], tokenizer, SEQLEN))
        runs = [("none", 16, 0)]
        for wbits in map(int, arguments.wbits.split(",")):
            for seed in range(arguments.seeds):
                runs += [(variant, wbits, seed) for variant in names if variant in VARIANTS]
        for variant, wbits, seed in runs:
            key = (label(model), variant, wbits, seed)
            if key in done:
                continue
            start = time.perf_counter()
            quantized = loaded
            if variant != "none":
                output = arguments.keep and arguments.keep / "-".join(map(str, key))
                how = groupsize(loaded), arguments.samples, output
                quantized = quantize(model, variant, wbits, seed, *how)
                quantizing = time.perf_counter() - start
            row = dict(zip(("model", "variant", "wbits", "seed"), key, strict=True))
            row["perplexity"] = round(perplexity(quantized, windows).perplexity, 5)
            if variant != "none":
                row["quantize_seconds"] = round(quantizing, 1)
                row["divergence"] = round(divergence(loaded, quantized, windows[:CHOOSING]), 4)
                if arguments.split:
                    rise = math.log(
                        row["perplexity"] / done[label(model), "none", 16, 0]["perplexity"]
                    )
                    row |= split(loaded, quantized, rise, windows)
            row["seconds"] = round(time.perf_counter() - start, 1)
            done[key] = row
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        for wbits in map(int, arguments.wbits.split(",")):
            print_table(done, label(model), wbits, names, arguments.seeds)


def print_table(done, model: str, wbits: int, names: list[str], seeds: int) -> None:
    """Mean rise and divergence, and the mean and spread of their shares of the first name's."""
    full = done[model, "none", 16, 0]["perplexity"]
    print(f"{model}, {wbits} bits, full precision {full:.3f}, {seeds} seeds; shares of {names[0]}")
    for variant in names:
        line = f"  {variant:26}"
        for what, measure in MEASURES.items():
            pairs = []
            for seed in range(seeds):  # a peer may have fewer
                pair = [done.get((model, name, wbits, seed), {}) for name in (variant, names[0])]
                if all(what in row for row in pair):
                    pairs.append([measure(row[what], full) for row in pair])
            if pairs:
                shares = [own / other for own, other in pairs]
                spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
                mean = statistics.mean(own for own, _ in pairs)
                line += f"   {what} {mean:+10.3f} {statistics.mean(shares):6.3f} +- {spread:.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
