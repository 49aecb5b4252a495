"""Where a run's seconds go, beside what the machine could do: ``python bench/profiling.py``.

One run in this process under torch's profiler, by default of the 61-million-parameter Llama of
``bench/model.py`` (32 x 512 tokens, 4 bits, groups of 128, the default settings):

    python bench/profiling.py        the default; --setting plain: the algorithm of the paper
    python bench/profiling.py SMOLLM2 --samples 64 --groupsize 64   a folder of bench/smollm2.py

Rows are what a stage spends in an operation itself. The floor of a product is its multiply-adds
over the machine's measured speed in the dtype of its factors, of any other operation the bytes that
it reads and writes over the bandwidth of a copy; a row's ratio is its time over its floor. Python
and the dispatch of operations are in the rows named (python): no floor.

Profiling costs time itself, of small operations most: a third of a run, in its loops over columns.
Appends the table to bench/results/profile.jsonl.
"""

import argparse
import re
from collections import defaultdict
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from machine import append, machine
from model import build
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.models.llama import modeling_llama  # noqa: F401  imported before the clock starts

import optq.core.descent
import optq.core.gptq
import optq.core.problem
import optq.core.qep
import optq.core.sweep
import optq.model.flow
import optq.model.inputs
import optq.quantize
import optq.solving
from optq import GPTQ, ModelConfig, Runner

RESULTS = Path(__file__).parent / "results" / "profile.jsonl"
STAGES = {  # name -> what is timed under it, unless it is inside another of them
    "forward": [(optq.model.flow.Flow, "_advance")],
    "hessian": [(optq.model.inputs.Hessian, "add"), (optq.model.inputs.Hessian, "matrix")],
    "drift": [(optq.model.inputs, "add_drift")],
    "factor": [(optq.core.problem, "factor")],
    "aim": [(optq.solving, "_aim")],
    "round": [(optq.core.gptq, "round_groups")],
    "grids in the sweep": [(optq.core.sweep.Sweep, "_fit_group")],
    "column loop": [(optq.core.sweep.Sweep, "_one_by_one")],
    "rest of the sweep": [(optq.core.gptq, "Sweep")],
    "polish: products": [(optq.core.descent._Descent, "_spread")],
    "polish: visits": [(optq.core.descent._Descent, "_visit")],
    "polish: rest": [(optq.core.gptq, "polish")],
    "errors": [
        (optq.core.gptq, "damped_error"),
        (optq.core.gptq, "undamped_error"),
        (optq.core.gptq, "compare_with_rounding"),
        (optq.core.gptq, "factored_error"),
        (optq.solving, "output_energy"),
    ],
    "rest of the solver": [(optq.solving.Solving, "solve")],
    "write": [(optq.quantize.Quantization, "_put")],
}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}
VIEWS = re.compile("slice|select|view|strided|expand|permute|transpose|::t$|empty|resolve|squeeze")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
SIZES = {"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "unsigned char": 1}
CACHED = 2**22  # bytes that may still be in the cache
SMALL = 0.01  # of the total: rows of less are summed


def label(owner: object, name: str, stage: str) -> None:
    inner = getattr(owner, name)

    def timed(*args, **kwargs):
        with record_function("@" + stage):
            return inner(*args, **kwargs)

    setattr(owner, name, timed)


def speeds() -> dict[str, float]:
    """Multiply-adds a second in products of 2048 columns, and bytes a second of a copy."""

    def seconds(run) -> float:
        times = []
        for _ in range(6):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        return median(times[1:])

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[str(dtype)] = 2048**3 / seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    for name, count in (("bytes", 2**25), ("cached bytes", 2**18)):
        source, target = torch.zeros(count), torch.zeros(count)
        found[name] = 2 * source.nbytes / seconds(lambda a=source, b=target: b.copy_(a))
    return found


def floor(event, stage: str, speed: dict[str, float]) -> float:
    """The least seconds an operation can take; 0 where it moves nothing."""
    name, shapes = event.name(), [shape for shape in event.shapes() if shape]
    kinds = [kind for kind in event.dtypes() if kind in SIZES]
    if not shapes or not kinds or VIEWS.search(name):
        return 0.0
    # The Hessian's products of float32 copies may run on bfloat16 units.
    quick = kinds[-1] == "c10::BFloat16" or (stage == "hessian" and name == "aten::addmm_")
    fastest = max(speed[str(torch.float32)], speed[str(torch.bfloat16)] if quick else 0)
    if name in PRODUCTS:
        left, right = shapes[-2:]
        return prod(left) * right[-1] / fastest
    if name == ATTENTION:
        query, key = shapes[0], shapes[1]
        return prod(query) * key[-2] / fastest  # causal: half of two products
    if name == "aten::linalg_solve_triangular":
        return prod(shapes[0]) * shapes[1][-1] / 2 / fastest
    pairs = zip(event.shapes(), event.dtypes(), strict=False)
    moved = sum(prod(shape) * SIZES[kind] for shape, kind in pairs if shape and kind in SIZES)
    return moved / speed["bytes" if moved > CACHED else "cached bytes"]


def table(events, speed: dict[str, float]) -> list[dict]:
    """Seconds, calls and floors by stage and operation; operations inside operations are theirs."""
    rows = defaultdict(lambda: [0, 0.0, 0.0])
    open_ones: list[list] = []  # of one thread: the operations under way

    def close(entry: list) -> None:
        event, stage, inner, calls = entry
        name = "(python)" if event.name()[0] == "@" else event.name()
        row = rows[stage, name]
        row[0] += 1
        row[1] += (event.duration_ns() - inner) / 1e9
        if not calls or event.name() in PRODUCTS | {ATTENTION}:  # of what calls others, theirs
            row[2] += floor(event, stage, speed)

    ordered = sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns()))
    for event in ordered:
        if (
            event.name().startswith("USDT")
            or event.start_thread_id() != ordered[0].start_thread_id()
        ):
            continue
        while (
            open_ones
            and open_ones[-1][0].start_ns() + open_ones[-1][0].duration_ns() <= event.start_ns()
        ):
            close(open_ones.pop())
        stage = open_ones[-1][1] if open_ones else "rest"
        if event.name()[0] == "@":
            stage = event.name()[1:]
        if open_ones:
            open_ones[-1][2] += event.duration_ns()
            open_ones[-1][3] += not VIEWS.search(event.name())
        open_ones.append([event, stage, 0, 0])
    while open_ones:
        close(open_ones.pop())
    return [
        {"stage": stage, "operation": name, "calls": row[0], "seconds": row[1], "floor": row[2]}
        for (stage, name), row in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--setting", choices=("plain", "default", "qep"), default="qep")
    parser.add_argument("--wbits", type=int, default=4)
    parser.add_argument("--groupsize", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="keeps the model")
    args = parser.parse_args()

    calib: object = str(args.model / "calibration.txt") if args.model else None
    if args.model is None:
        args.model, tokens = build(args.cache.resolve())
        calib = torch.load(tokens)[: args.samples]
    for stage, places in STAGES.items():
        for owner, name in places:
            label(owner, name, stage)
    kind = GPTQ.plain if args.setting == "plain" else GPTQ
    run = Runner(
        ModelConfig(str(args.model), "cpu"),
        kind(args.wbits, args.groupsize),
        args.setting == "qep",
        calib=calib,
        nsamples=args.samples,
        seqlen=512,
    )
    speed, about = speeds(), machine()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        start = perf_counter()
        run.run()
        total = perf_counter() - start
    rows = table(recorded.profiler.kineto_results.events(), speed)
    show(rows, total, speed)
    about |= {"model": args.model.name, "setting": args.setting, "wbits": args.wbits}
    kept = [row for row in rows if row["seconds"] > SMALL / 10 * total]
    for row in kept:
        row |= {name: round(row[name], 4) for name in ("seconds", "floor")}
    append(RESULTS, {**about, "total": round(total, 2), "speed": speed, "rows": kept})


def show(rows: list[dict], total: float, speed: dict[str, float]) -> None:
    print(
        ", ".join(
            f"{name.removeprefix('torch.')} {value / 1e9:.0f} G/s" for name, value in speed.items()
        )
    )
    print(f"{'stage':20} {'operation':38} {'calls':>7} {'seconds':>8} {'floor':>7} {'ratio':>6}")
    stages = sorted(
        {row["stage"] for row in rows},
        key=lambda s: -sum(r["seconds"] for r in rows if r["stage"] == s),
    )
    for stage in stages:
        own = sorted((r for r in rows if r["stage"] == stage), key=lambda row: -row["seconds"])
        few = [row for row in own if row["seconds"] < SMALL * total]
        some = [row for row in own if row not in few]
        lines = [
            {"operation": "all", **sums(own)},
            *(some if len(own) > 1 else []),
            *([{"operation": f"{len(few)} others", **sums(few)}] if few and some else []),
        ]
        for line in lines:
            ratio = f"{line['seconds'] / line['floor']:6.1f}" if line["floor"] > 1e-4 else ""
            name = stage if line["operation"] == "all" else ""
            print(
                f"{name:20} {line['operation'].removeprefix('aten::'):38} {line['calls']:7} "
                f"{line['seconds']:8.3f} {line['floor']:7.3f} {ratio}"
            )
    print(f"{'':59} {total:16.2f}")


def sums(rows: list[dict]) -> dict:
    return {name: sum(row[name] for row in rows) for name in ("calls", "seconds", "floor")}


if __name__ == "__main__":
    main()
