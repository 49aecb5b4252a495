"""Commands that put settings beside each other: demo, compare."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optq.cli import imports
from optq.cli.app import app, print_json, words
from optq.cli.options import NSAMPLES, Device, Dtype, Json, Model, Seqlen, Skip
from optq.cli.solver import fitting_groupsize, tell_groupsize


@app.command()
def demo(device: Device = "auto", as_json: Json = False) -> None:
    """Round-to-nearest beside GPTQ at 4, 3 and 2 bits, on the bundled model; and a report."""
    from optq.cli.report import DemoReport
    from optq.report import compared, progress, steps

    with nullcontext() if as_json else DemoReport() as report:
        with progress.bar("optq demo") as bar:
            bar(0, 1, "starting")
            imports.load()
            from optq.compare import demo_rows

            done = () if report is None else (report.add,)
            rows = [asdict(row) for row in demo_rows(device, bar, *done)]
        path = None if report is None else report.write()
    if as_json:
        print_json({"model": "demo", "rows": rows})
        return
    compared.show(rows)
    see = "" if path is None else f"open {path} in a browser; or "
    steps.show(f"{see}optq quantize MODEL OUT, of a folder or a hub id in the place of MODEL")


@app.command()
def compare(
    model: Model,
    methods: Annotated[
        str,
        typer.Option(
            help="Of rtn, plain (the paper's), no-qep, gptq, best (tuned); of 8-bit activations"
            " w8a8, smoothquant, llm-int8; of fewer weights prune-0.5, prune-2:4."
        ),
    ] = "rtn,plain,no-qep,gptq",
    wbits: Annotated[str, typer.Option(help="Of 2, 3, 4, 8.")] = "4,3,2",
    bits_per_weight: Annotated[
        str | None, typer.Option(help="Budgets too: each layer its own width.")
    ] = None,
    groupsize: Annotated[str | None, typer.Option(help="One or more; as of quantize.")] = None,
    calib: Annotated[str | None, typer.Option(help="As of quantize.")] = None,
    text: Annotated[str | None, typer.Option(help="Held-out text, as --text of eval.")] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = NSAMPLES,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the calibration sequences.")] = 0,
    skip: Skip = None,
    device: Device = "auto",
    dtype: Dtype = None,
    results: Annotated[
        Path, typer.Option(help="Rows that are done: the same command goes on from them.")
    ] = Path("optq-compare.jsonl"),
    speed: Annotated[
        bool, typer.Option("--speed", help="Tokens per second too, from packed weights.")
    ] = False,
    chart: Annotated[Path | None, typer.Option(help="An SVG to draw.")] = None,
    as_json: Json = False,
) -> None:
    """Many settings on MODEL with one calibration: size, perplexity, divergence, seconds."""
    from optq.report import chart as svg
    from optq.report import compared, progress, steps

    if chart is not None:
        svg.check(chart)
    with progress.bar("optq compare") as bar:
        bar(0, 1, "starting")
        imports.load()
        from optq.compare import Comparison
        from optq.config import ModelConfig
        from optq.plan import Skeleton

        config = ModelConfig(model, device, dtype)
        if groupsize is None:
            sizes = [fitting_groupsize(Skeleton.of(config.plain_checkpoint(), skip).blocks)]
        else:
            sizes = words("--groupsize", groupsize, int)
        comparison = Comparison(
            config,
            words("--methods", methods),
            words("--wbits", wbits, int),
            sizes,
            ("demo" if config.is_demo else "c4") if calib is None else calib,
            ("demo" if config.is_demo else "wikitext2") if text is None else text,
            nsamples,
            seqlen,
            seed,
            skip,
            () if bits_per_weight is None else words("--bits-per-weight", bits_per_weight, float),
            speed=speed,
        )
        rows = [asdict(row) for row in comparison.run(results, bar)]
    if groupsize is None:
        tell_groupsize(sizes[0])
    if chart is not None:
        svg.write(chart, model, rows)
    if as_json:
        print_json({"model": model, "rows": rows})
        return
    compared.show(rows)
    same = {"calib": calib, "nsamples": None if nsamples == NSAMPLES else nsamples}
    same |= {"seqlen": seqlen, "seed": seed or None, "skip": skip, "dtype": dtype}
    steps.show(steps.after_comparison(model, rows, same))
