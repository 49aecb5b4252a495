"""A whole model: OPTQ beside llm-compressor and GPTQModel, on the same model and tokens.

The 61-million-parameter Llama of ``bench/model.py``, 32 x 512 tokens, 4 bits, groups of 128,
symmetric, no act-order, on the CPU with all cores. Each peer lives in a virtual environment of
its own, since their requirements exclude each other's:

    python -m venv LLMC && LLMC/bin/pip install torch==2.13.0 llmcompressor
    python -m venv GPTQ && GPTQ/bin/pip install gptqmodel
    python bench/pipeline.py --llmcompressor LLMC/bin/python --gptqmodel GPTQ/bin/python --runs 3

``--defaults`` adds OPTQ's own settings, and the peers' for quality: range search with act-order, or
with GPTQModel's group-aware order. ``--model experts`` takes one block of 128 experts instead, with
Qwen3-30B-A3B's shapes; a folder of ``bench/smollm2.py`` that model, 64 x 512 tokens of its text,
groups of 64, and the settings for quality alone. A tool that fails is recorded with its error, and
one that takes longer than ``--limit`` with that.

``--before CHECKOUT`` sets another commit beside this one, for a change that should cost no time:

    git worktree add BEFORE COMMIT && python bench/pipeline.py --defaults --before BEFORE --runs 5

The tools take turns, each run a fresh process, so that a slow minute of the machine hits all of
them. Compared are medians of ``quantize_seconds``, without loading and saving, and of
``total_seconds``, with both: GPTQModel packs the codes while it quantizes, the others while they
save, so the first alone is a little hard on it. Appends one record to
bench/results/pipeline.jsonl and prints a table.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import append, machine
from model import CONFIGS, build

BENCH = Path(__file__).parent
RESULTS = BENCH / "results" / "pipeline.jsonl"
PHASES = ("load_seconds", "quantize_seconds", "save_seconds")
QUALITY = {"llmcompressor": "mse", "gptqmodel": "group"}
COMPARED = ("quantize_seconds", "total_seconds")
REPORTED = (*COMPARED, "load_seconds", "save_seconds", "peak_memory_over_model_gb")


class ToolError(Exception):
    """A tool that did not get through."""


def run_once(
    python: str,
    script: Path,
    checkpoint: Path,
    tokens: Path,
    best: str | None = None,
    source: Path | None = None,
    limit: float | None = None,
    groupsize: int = 128,
) -> dict[str, object]:
    """One run in a process of its own; its record is the last line it prints.

    ``source``: the folder that OPTQ is imported from, if not where it is installed.
    """
    inputs = ("--model", checkpoint, "--tokens", tokens, "--groupsize", str(groupsize))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            process = subprocess.run(
                [
                    *(python, script, *inputs, "--out", Path(scratch) / "out"),
                    *(("--best", best) if best else ()),
                ],
                capture_output=True,
                text=True,
                cwd=scratch,  # GPTQModel leaves logs where it runs
                env=os.environ | ({"PYTHONPATH": str(source)} if source else {}),
                check=False,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"{script.name}:\nnot done after {limit:.0f} s") from error
    if process.returncode:
        raise ToolError(f"{script.name}:\n{process.stderr[-4000:]}")
    record = json.loads(process.stdout.splitlines()[-1])
    return {**record, "total_seconds": round(sum(record[phase] for phase in PHASES), 3)}


def drawn(args: argparse.Namespace) -> Path:
    """The calibration tokens of a folder's text, as a file that all tools read."""
    from optq import ModelConfig
    from optq.data.calibration import calibration_tokens

    tokens = args.cache.resolve() / f"{Path(args.model).name}.pt"
    tokens.parent.mkdir(parents=True, exist_ok=True)
    _, tokenizer = ModelConfig(args.model, "cpu").load()
    text = str(Path(args.model) / "calibration.txt")
    torch.save(calibration_tokens(text, tokenizer, 64, 512, 0), tokens)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="Python that has llm-compressor")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="Python that has GPTQModel")
    parser.add_argument(
        "--defaults", action="store_true", help="and what each tool has for quality"
    )
    parser.add_argument("--before", metavar="CHECKOUT", type=Path, help="of an earlier commit")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for one run of a tool")
    parser.add_argument("--model", default="llama", help=f"{', '.join(CONFIGS)}, or a folder")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="keeps the model")
    args = parser.parse_args()

    own, groupsize = args.model in CONFIGS, 128
    if own:
        checkpoint, tokens = build(args.cache.resolve(), args.model)
    else:
        checkpoint, tokens, groupsize = Path(args.model).resolve(), drawn(args), 64
    tools = {"optq": (sys.executable, BENCH / "ours.py", None, None)} if own else {}
    if args.defaults or not own:
        for best in ("default", "qep") if own else ("qep",):
            tools[f"optq {best}"] = (sys.executable, BENCH / "ours.py", best, None)
    if args.before:
        source = args.before.resolve() / "src"
        pairs = {name: (tool, (*tool[:3], source)) for name, tool in tools.items()}
        tools = {}
        for name, (now, then) in pairs.items():  # one right after the other
            tools |= {name: now, f"{name}, before": then}
    for name, best in QUALITY.items():
        if python := getattr(args, name):
            # Absolute, but with its symbolic links, by which a Python knows its environment.
            python = os.path.abspath(shutil.which(python) or python)
            script = BENCH / "peers" / f"{name}_run.py"
            if own:
                tools[name] = (python, script, None, None)
            if args.defaults or not own:
                tools[f"{name} {best}"] = (python, script, best, None)

    before = machine()
    runs: dict[str, list[dict]] = {name: [] for name in tools}
    failed: dict[str, str] = {}
    for turn in range(args.runs):
        for name, (python, script, best, source) in tools.items():
            if name in failed:
                continue
            try:
                how = best, source, args.limit, groupsize
                record = run_once(python, script, checkpoint, tokens, *how)
            except ToolError as error:
                print(f"{name} failed: {error}", file=sys.stderr)
                failed[name] = str(error).strip().splitlines()[-1]
                continue
            runs[name].append(record)
            print(f"run {turn + 1}: {name} {record['quantize_seconds']:.1f} s", file=sys.stderr)

    medians = {
        name: {key: statistics.median(run[key] for run in records) for key in REPORTED}
        for name, records in runs.items()
        if records
    }
    first = next(iter(medians.values()))
    ratios = {
        key: {name: round(each[key] / first[key], 2) for name, each in medians.items()}
        for key in COMPARED
    }
    pairs = {name: runs[f"{name}, before"] for name in runs if f"{name}, before" in runs}
    slower = {
        name: statistics.median(
            now["quantize_seconds"] / then["quantize_seconds"]
            for now, then in zip(runs[name], earlier, strict=True)
        )
        for name, earlier in pairs.items()
    }
    before |= {"model": checkpoint.name, "failed": failed}
    append(RESULTS, {**before, "runs": runs, "median": medians, "ratio": ratios, "pairs": slower})
    print_table(runs, medians, ratios)
    for name, ratio in slower.items():
        print(f"{name}: {ratio:.3f} of before, the median of {args.runs} pairs")


def print_table(runs: dict, medians: dict, ratios: dict) -> None:
    """Medians, one line to a tool; a time that is compared is followed by its ratio to ours."""
    rows = [
        ("tool", "version", "torch", "quantize s", "x", "total s", "x", "load s", "save s", "GB")
    ]
    for name, each in medians.items():
        first = runs[name][0]
        numbers = []
        for key in REPORTED:
            numbers.append(f"{each[key]:.2f}")
            if key in COMPARED:
                numbers.append(f"{ratios[key][name]:.2f}")
        rows.append((name, first["version"], first["torch"], *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
