"""Commands that quantize: demo, quantize, compare."""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optq.cli.app import app, print_json, refuse_given, say, size, words
from optq.cli.options import FORMATS_HELP, Device, Dtype, Json, Model, Seqlen, Skip
from optq.errors import SettingError

if TYPE_CHECKING:
    from optq.model.blocks import Block

DEFAULT_GROUPSIZE = 128
DEFAULT_WBITS = 4


@app.command()
def demo(device: Device = "auto", as_json: Json = False) -> None:
    """Round-to-nearest beside GPTQ at 4, 3 and 2 bits, on the bundled model."""
    from optq.compare import demo_rows
    from optq.report import progress, tables

    with progress.bar("optq demo") as bar:
        rows = [asdict(row) for row in demo_rows(device, bar)]
    print_json({"model": "demo", "rows": rows}) if as_json else tables.compared(rows)


@app.command()
def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    method: Annotated[str, typer.Option(help="gptq, rtn (round to nearest) or obq.")] = "gptq",
    wbits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8. Default: 4.")] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(help="Each layer its own width: so many in the mean, as stored, 3.25 say."),
    ] = None,
    in_all: Annotated[
        str | None,
        typer.Option("--size", help="The same, for a checkpoint of at most this size, 4.2GB say."),
    ] = None,
    groupsize: Annotated[
        int | None,
        typer.Option(help="Columns to a scale; -1: the row. Default: 128, or 64 or 32 if it fits."),
    ] = None,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Zero point fixed, or fitted.")] = True,
    plain: Annotated[
        bool, typer.Option("--plain", help="The paper's GPTQ; without it the best options known.")
    ] = False,
    actorder: Annotated[
        bool | None,
        typer.Option(
            help="Columns of large activations first, across groups: the file then needs g_idx."
            " (The default order stays inside the groups.)"
        ),
    ] = None,
    static_groups: Annotated[
        bool | None, typer.Option(help="Fit all grids beforehand: act-order costs nothing then.")
    ] = None,
    mse: Annotated[bool | None, typer.Option(help="Search the range of each grid.")] = None,
    polish: Annotated[
        int | None, typer.Option(help="Rounds that mend codes and scales after the sweep.")
    ] = None,
    percdamp: Annotated[
        float | None, typer.Option(help="Damping, of the mean of diag H. Default: 0.01.")
    ] = None,
    qep: Annotated[
        bool | None,
        typer.Option(help="Error propagation, qep=True in Python. Default: gptq below 8 bits."),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="demo, a .txt, .jsonl or .json file, wikitext2, ptb, c4, NAME:SPLIT:COLUMN."
            " Default: c4; demo for the bundled model."
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the calibration sequences.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    skip: Skip = None,
    head: Annotated[
        int | None, typer.Option(help="Quantize the output head too, to 8 or 4 bits.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="With --head, where the head is the embeddings.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = None,
    file_format: Annotated[str, typer.Option("--format", help=f"{FORMATS_HELP}.")] = "gptq",
    activation_memory: Annotated[
        str | None,
        typer.Option(
            help="What batches may hold on the device, 8GB say; the rest goes to host memory, then"
            " to files. Default: half of what is free."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Do not go on from a run that was cut off.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what a run would do and need, and do nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and write the checkpoint OUT."""
    if dry_run:
        gc.disable()  # a short life with many small objects: looking for garbage is a part of it
        context.call_on_close(gc.enable)
    from optq.config import ModelConfig
    from optq.core.gptq import BEST
    from optq.model.head import with_own_head
    from optq.plan import Skeleton
    from optq.quantize import Progress
    from optq.ranks import reports
    from optq.report import progress, tables
    from optq.runner import Runner

    config, skeleton = ModelConfig(model, device, dtype), None
    options = {"sym": sym, "mse": mse, "percdamp": percdamp, "polish": polish}
    options |= {"actorder": actorder, "static_groups": static_groups}
    asked = DEFAULT_GROUPSIZE if groupsize is None else groupsize
    budget = {"bits_per_weight": bits_per_weight, "size": size("--size", in_all)}
    quantizer = _quantizer(method, wbits, budget, asked, plain, options)
    if groupsize is None or dry_run:
        checkpoint = with_own_head(config.plain_checkpoint(not dry_run), head, untie)
        skeleton = Skeleton.of(checkpoint, skip, head)
    if groupsize is None and skeleton:
        quantizer = replace(quantizer, groupsize=_groupsize(skeleton.blocks))
    if qep is None:
        qep = method == "gptq" and not plain and BEST[wbits or DEFAULT_WBITS].qep
    memory = size("--activation-memory", activation_memory)
    calib = ("demo" if config.is_demo else "c4") if calib is None else calib
    runner = Runner(
        config,
        quantizer,
        qep=qep,
        calib=calib,
        output=out,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        format=file_format,
        skip=skip,
        head=head,
        untie=untie,
        chat=chat,
        force=force,
        restart=restart,
        activation_memory=memory,
        notice=say,
    )
    if dry_run:
        plan = runner.plan(skeleton)
        told = {"model": model, "out": str(out), "method": method, "qep": bool(qep), "head": head}
        settings = {"format": file_format} | told | asdict(quantizer)
        print_json(settings | plan.told()) if as_json else tables.planned(plan)
        plan.check(out)
        return
    with progress.bar("quantizing", reports()) as bar:
        bar(0, 1, "reading model and text")

        def solved(step: Progress) -> None:
            if not step.layers:
                return bar(step.block, step.blocks, f"{step.site} at each width")
            worst = max(step.layers, key=lambda layer: layer.relative_error)
            note = f"{step.site} error {worst.relative_error:.2%}"
            bar(step.block, step.blocks, note)

        runner.progress = solved
        runner.tuning = lambda step, steps, far: bar(step, steps, f"tuning: divergence {far:.4f}")
        runner.reading = lambda done, of: bar(0, 1, f"reading text: {done} of {of}")
        result = runner.run()
    if not reports():
        return
    if groupsize is None:
        _tell(quantizer.groupsize)
    made, distilled = result.record.calibration, result.record.model_dump()["distilled"]
    if as_json:
        timed = [layer.model_dump() | {"seconds": layer.seconds} for layer in result.layers]
        settings = {"model": model, "out": str(out), "method": method, "qep": bool(qep)}
        settings |= {"head": head, "wbits": None, "actorder": False, "percdamp": None}
        settings |= asdict(quantizer)
        sizes = {"bits_per_weight": result.bits_per_weight, "bytes": result.bytes}
        chosen = {} if result.choices is None else {"choices": tables.chosen(result.choices)}
        rest = {"seconds": result.seconds, "distilled": distilled, "layers": timed}
        print_json(settings | sizes | chosen | rest)
        return
    weights = sum(layer.rows * layer.cols for layer in result.layers)
    total, rounding = (
        sum(getattr(layer, name) for layer in result.layers) for name in ("error", "rtn_error")
    )
    if result.choices is not None:
        tables.widths(tables.chosen(result.choices))
    tables.stages(result.seconds)
    tables.facts(
        {
            "wrote": f"{out}  ({file_format}, {result.bits_per_weight:.2f} bits per weight)",
            "layers": f"{len(result.layers)} quantized, {tables.size(result.bytes)} for"
            f" {weights / 1e6:.1f} million weights; {len(result.dense)} linear layers left dense",
            "error": f"{total / rounding:.0%} of round-to-nearest's" if rounding else "0",
            **tables.short_of_tokens([layer.model_dump() for layer in result.layers]),
            **tables.held(result.activations),
            **tables.tuned(distilled),
            "calibrated": f"on {calib}, {made['samples']} x {made['seqlen']} tokens, seed {seed}",
            "next": f"optq eval {out}{' --text demo' if calib == 'demo' else ''}"
            f"    optq inspect {out}    optq generate {out} PROMPT",
        }
    )


@app.command()
def compare(
    model: Model,
    methods: Annotated[
        str, typer.Option(help="Of rtn, plain (the paper's GPTQ), no-qep, gptq.")
    ] = "rtn,plain,no-qep,gptq",
    wbits: Annotated[str, typer.Option(help="Of 2, 3, 4, 8.")] = "4,3,2",
    bits_per_weight: Annotated[
        str | None, typer.Option(help="Budgets too: each layer its own width.")
    ] = None,
    groupsize: Annotated[str | None, typer.Option(help="One or more; as of quantize.")] = None,
    calib: Annotated[str | None, typer.Option(help="As of quantize.")] = None,
    text: Annotated[str | None, typer.Option(help="Held-out text, as --text of eval.")] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the calibration sequences.")] = 0,
    skip: Skip = None,
    device: Device = "auto",
    dtype: Dtype = None,
    results: Annotated[
        Path, typer.Option(help="Rows that are done: the same command goes on from them.")
    ] = Path("optq-compare.jsonl"),
    chart: Annotated[Path | None, typer.Option(help="An SVG to draw.")] = None,
    as_json: Json = False,
) -> None:
    """Many settings on MODEL with one calibration: size, perplexity, rise, seconds."""
    from optq.compare import Comparison
    from optq.config import ModelConfig
    from optq.plan import Skeleton
    from optq.report import chart as svg
    from optq.report import progress, tables

    if chart is not None:
        svg.check(chart)
    config = ModelConfig(model, device, dtype)
    if groupsize is None:
        sizes = [_groupsize(Skeleton.of(config.plain_checkpoint(), skip).blocks)]
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
    )
    with progress.bar("optq compare") as bar:
        rows = [asdict(row) for row in comparison.run(results, bar)]
    if groupsize is None:
        _tell(sizes[0])
    if chart is not None:
        svg.write(chart, model, rows)
    print_json({"model": model, "rows": rows}) if as_json else tables.compared(rows)


def _quantizer(
    method: str,
    wbits: int | None,
    budget: dict[str, Any],
    groupsize: int,
    plain: bool,
    options: dict[str, Any],
) -> Any:
    """The solver, with those options that it has; one that it lacks must not be asked for."""
    from optq.budget import Mixed
    from optq.core.gptq import GPTQ
    from optq.core.methods import METHODS

    if method not in METHODS:
        raise SettingError(f"the method {method} is unknown", f"choose {', '.join(METHODS)}")
    solver, known = METHODS[method], {field.name for field in fields(METHODS[method])}
    if solver is not GPTQ:
        lacking = {name: value for name, value in options.items() if name not in known}
        refuse_given(
            lacking | {"plain": plain or None}, method, "leave it out, or use --method gptq"
        )
    given = {name: value for name, value in options.items() if value is not None}
    if any(value is not None for value in budget.values()):
        if solver is not GPTQ:
            refuse_given(budget, f"--method {method}", "leave it out, or use --method gptq")
        refuse_given({"wbits": wbits}, "a run within a budget", "leave it out: widths are chosen")
        return (Mixed.plain if plain else Mixed)(**budget, groupsize=groupsize, **given)
    build = GPTQ.plain if plain else solver
    return build(wbits=DEFAULT_WBITS if wbits is None else wbits, groupsize=groupsize, **given)


def _groupsize(blocks: list[Block]) -> int:
    """Where none was given: the largest of three that divides the columns of every layer."""
    columns = {layer.shape[1] for block in blocks for layer in block.layers}
    fitting = (n for n in (DEFAULT_GROUPSIZE, 64, 32) if not any(count % n for count in columns))
    return next(fitting, DEFAULT_GROUPSIZE)  # which is then refused, with what to do


def _tell(groupsize: int) -> None:
    """After the run, so that what refuses it stands alone on stderr."""
    if groupsize != DEFAULT_GROUPSIZE:
        print(f"optq: --groupsize {groupsize}: 128 does not fit every layer", file=sys.stderr)
