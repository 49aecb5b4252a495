"""The command that removes weights: prune."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from optq.cli import imports, outcome
from optq.cli.app import app, refuse_given, reports, say, size
from optq.cli.options import (
    FORMATS_HELP,
    NSAMPLES,
    ActivationMemory,
    Calib,
    Chat,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Model,
    NSamples,
    Restart,
    Seed,
    Seqlen,
    Skip,
)
from optq.cli.solver import DEFAULT_GROUPSIZE, fitting_groupsize, tell_groupsize
from optq.errors import SettingError


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    sparsity: Annotated[
        str,
        typer.Option(
            help="The share to remove, 0.5 say; or 2:4, 4:8: so many of each so many columns stay."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="sparsegpt, obs (exact and slow), wanda or magnitude.")
    ] = "sparsegpt",
    wbits: Annotated[
        int | None, typer.Option(help="Quantize what stays, to 2, 3, 4 or 8. Default: not.")
    ] = None,
    groupsize: Annotated[
        int | None,
        typer.Option(help="Columns to a scale; -1: the row. Default: 128, or 64 or 32 if it fits."),
    ] = None,
    sym: Annotated[
        bool | None, typer.Option("--sym/--asym", help="Zero point fixed, or fitted.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="The paper's SparseGPT.")] = False,
    mse: Annotated[bool | None, typer.Option(help="Search the range of each grid.")] = None,
    percdamp: Annotated[
        float | None, typer.Option(help="Damping, of the mean of diag H. Default: 0.01.")
    ] = None,
    qep: Annotated[
        bool | None,
        typer.Option(help="Error propagation, qep=True in Python. Default: sparsegpt and obs."),
    ] = None,
    calib: Calib = None,
    nsamples: NSamples = NSAMPLES,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    chat: Chat = False,
    skip: Skip = None,
    device: Device = "auto",
    dtype: Dtype = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help=f"With --wbits: {FORMATS_HELP}.")
    ] = None,
    activation_memory: ActivationMemory = None,
    force: Force = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove weights of MODEL, and write OUT: with zeros, or quantized as well."""
    from optq.report import live

    with live.quantizing(reports(), "magnitude") as told:
        imports.load()
        from optq.config import ModelConfig
        from optq.plan import Skeleton
        from optq.runner import Runner

        config, skeleton = ModelConfig(model, device, dtype), None
        of_codes = {"groupsize": groupsize, "mse": mse, "format": file_format}
        if wbits is None:
            of_codes["asym" if sym is False else "sym"] = None if sym is None else True
            remedy = "leave it out, or quantize what stays with --wbits 4, say"
            refuse_given(of_codes, "pruning without --wbits", remedy)
        options = {"sym": sym, "mse": mse, "percdamp": percdamp, "groupsize": groupsize}
        quantizer = pruner_of(method, sparsity, wbits, plain, options)
        fitted = wbits is not None and groupsize is None
        if fitted or dry_run:
            skeleton = Skeleton.of(config.plain_checkpoint(not dry_run), skip)
        if fitted and skeleton:
            quantizer = replace(quantizer, groupsize=fitting_groupsize(skeleton.blocks))
        if qep is None:
            qep = method in ("sparsegpt", "obs") and not plain
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
            chat=chat,
            force=force,
            restart=restart,
            activation_memory=size("--activation-memory", activation_memory),
            notice=say,
        )
        if not dry_run:
            told.begin()
            runner.progress, runner.reading = told.solved, told.reading
            result = runner.run()
    form = "dense" if wbits is None else file_format or "gptq"
    settings = {"model": model, "out": str(out), "method": method, "qep": bool(qep)}
    settings |= {"format": form} | asdict(quantizer)
    if dry_run:
        outcome.of_plan(runner.plan(skeleton), settings, out, as_json)
        return
    if not reports():
        return
    if fitted:
        tell_groupsize(quantizer.groupsize)
    if as_json:
        outcome.as_object(result, settings)
        return
    what = f"pruned to {sparsity}" + ("" if wbits is None else f" and {wbits} bits")
    outcome.as_tables(result, out, form, what, "magnitude", calib)
    outcome.next_steps(out, model, calib)


def pruner_of(
    method: str, sparsity: str, wbits: int | None, plain: bool, options: dict[str, Any]
) -> Any:
    """The method, with those options that it has; one that it lacks must not be asked for."""
    from optq.core.methods import PRUNERS
    from optq.core.sparsegpt import SparseGPT

    if method not in PRUNERS:
        raise SettingError(f"the method {method} is unknown", f"choose {', '.join(PRUNERS)}")
    solver, known = PRUNERS[method], {field.name for field in fields(PRUNERS[method])}
    lacking = {name: value for name, value in options.items() if name not in known}
    if solver is not SparseGPT:
        lacking["plain"] = plain or None
    refuse_given(lacking, method, "leave it out, or use --method sparsegpt")
    given = {name: value for name, value in options.items() if value is not None}
    if wbits is not None and "groupsize" in known:
        given = {"groupsize": DEFAULT_GROUPSIZE} | given
    try:
        share: float | str = float(sparsity)
    except ValueError:
        share = sparsity
    return (SparseGPT.plain if plain else solver)(share, wbits, **given)
