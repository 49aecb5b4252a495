"""Other tools at their best settings, on the models and tokens of ``bench/quality.py``.

    python bench/quality_peers.py MODEL.. --llmcompressor PYTHON --gptqmodel PYTHON \
        --autoround PYTHON

Each tool gets the same checkpoint, bits, group size and calibration tokens, and writes what it
writes; OPTQ loads that and measures it as it measures its own. Where a tool has several good
settings each is run. Appends to the same results file, with the tool as the variant; of AutoRound
with other than its default 200 steps also their number. ``quantize_seconds`` are the tool's own,
without loading, saving and measuring.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from quality import (
    CHOOSING,
    FINAL,
    RESULTS,
    SAMPLES,
    SEQLEN,
    divergence,
    final,
    groupsize,
    label,
    read,
    texts,
)
from torch import Tensor

import optq
from optq import ModelConfig
from optq.data.calibration import calibration_tokens
from optq.data.evaluation import evaluation_tokens
from optq.evaluate.perplexity import perplexity
from optq.model.linear import make_dense

PEERS = Path(__file__).resolve().parent / "peers"
VARIANTS = {
    "llm-compressor": ("llmcompressor", "mse"),
    "gptqmodel group": ("gptqmodel", "group"),
    "gptqmodel act": ("gptqmodel", "act"),
    "autoround": ("autoround", "tuned"),
}
ITERS = 200  # AutoRound's default


def run(
    python: str,
    tool: str,
    best: str,
    model: Path,
    tokens: Tensor,
    wbits: int,
    scratch: Path,
    **options: int,
) -> subprocess.CompletedProcess:
    """Quantize a checkpoint with a tool, under its own Python, to ``out`` in ``scratch``.

    ``options`` are further ones of :func:`peers.measure.arguments`.
    """
    torch.save(tokens, scratch / "tokens.pt")
    # Absolute, but with its links, by which a Python knows its environment.
    command = [os.path.abspath(python), PEERS / f"{tool}_run.py", "--model", model.resolve()]
    command += ["--tokens", scratch / "tokens.pt", "--out", scratch / "out"]
    command += ["--wbits", wbits, "--best", best]
    command += [f"--{name}={value}" for name, value in options.items()]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=scratch,  # GPTQModel leaves logs where it runs
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--llmcompressor", help="its Python")
    parser.add_argument("--gptqmodel", help="its Python")
    parser.add_argument("--autoround", help="its Python")
    parser.add_argument("--iters", type=int, default=ITERS, help="AutoRound's steps a block")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--windows", type=int, default=FINAL)
    parser.add_argument("--wbits", default="4,3,2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    done = read(arguments.results)
    for model in arguments.models:
        config, (calib, text) = ModelConfig(model, "cpu"), texts(model)
        checkpoint, (full, tokenizer) = config.checkpoint(), config.load()
        windows = final(evaluation_tokens(text, tokenizer, SEQLEN), arguments.windows)
        for wbits in map(int, arguments.wbits.split(",")):
            for seed in range(arguments.seeds):
                for variant, (tool, best) in VARIANTS.items():
                    python = getattr(arguments, tool)
                    steps = tool == "autoround" and arguments.iters != ITERS
                    named = f"{variant} {arguments.iters}" if steps else variant
                    key = (label(model), named, wbits, seed)
                    if python is None or key in done:
                        continue
                    start = time.perf_counter()
                    with TemporaryDirectory() as scratch:
                        size = (arguments.samples, SEQLEN)
                        drawn = calibration_tokens(calib, tokenizer, *size, seed)
                        folder = Path(scratch)
                        ran = run(
                            python,
                            tool,
                            best,
                            checkpoint.folder,
                            drawn,
                            wbits,
                            folder,
                            groupsize=groupsize(full),
                            iters=arguments.iters,
                        )
                        if ran.returncode:
                            print(key, "failed:", ran.stderr[-600:], flush=True)
                            continue
                        quantized = optq.load(folder / "out", "cpu")
                    make_dense(quantized)
                    row = dict(zip(("model", "variant", "wbits", "seed"), key, strict=True))
                    row["perplexity"] = round(perplexity(quantized, windows).perplexity, 5)
                    row["divergence"] = round(divergence(full, quantized, windows[:CHOOSING]), 4)
                    own = json.loads(ran.stdout.splitlines()[-1])
                    row["quantize_seconds"] = own["quantize_seconds"]
                    row["seconds"] = round(time.perf_counter() - start, 1)
                    print(row, flush=True)
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
