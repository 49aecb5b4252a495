"""The main command: quantize."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from optq.cli import imports, llm_int8, outcome
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
from optq.cli.solver import (
    DEFAULT_WBITS,
    fitting_groupsize,
    solver_of,
    tell_groupsize,
)
from optq.errors import SettingError


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    method: Annotated[
        str, typer.Option(help="gptq, rtn (round to nearest), obq, smoothquant or llm-int8.")
    ] = "gptq",
    wbits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8. Default: 4.")] = None,
    abits: Annotated[
        int | None, typer.Option(help="Activations too, in 8 bits: the default of smoothquant.")
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(help="Of smoothquant, 0 to 1, or off. Default: searched at each site."),
    ] = None,
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
    plain: Annotated[bool, typer.Option("--plain", help="The paper's GPTQ.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="The default without error propagation: half the time.")
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="The default, tuned: --tune model, many times the time.")
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
    tune: Annotated[
        str | None,
        typer.Option(
            help="After the solver: blocks, each as soon as it is solved; or model, that and then"
            " all scales at once."
        ),
    ] = None,
    calib: Calib = None,
    nsamples: NSamples = NSAMPLES,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    chat: Chat = False,
    skip: Skip = None,
    head: Annotated[
        int | None, typer.Option(help="Quantize the output head too, to 8 or 4 bits.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="With --head, where the head is the embeddings.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help=f"{FORMATS_HELP}. Default: gptq; with --abits compressed-tensors."
        ),
    ] = None,
    activation_memory: ActivationMemory = None,
    force: Force = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and write the checkpoint OUT."""
    from optq.report import live, tables

    if method == "llm-int8":
        unused = {
            "wbits": None if wbits == 8 else wbits,
            "abits": None if abits == 8 else abits,
            "sym": None if sym else False,
            "nsamples": None if nsamples == NSAMPLES else nsamples,
            "format": file_format,
            "size": in_all,
            **{"alpha": alpha, "bits_per_weight": bits_per_weight, "groupsize": groupsize},
            **{"plain": plain or None, "fast": fast or None, "best": best or None},
            **{"actorder": actorder, "static_groups": static_groups, "mse": mse},
            **{"polish": polish, "percdamp": percdamp, "qep": qep, "tune": tune, "calib": calib},
            **{"seqlen": seqlen, "seed": seed or None, "chat": chat or None, "head": head},
            **{"untie": untie or None, "activation_memory": activation_memory},
            **{"restart": restart or None, "dry_run": dry_run or None},
        }
        llm_int8.run(model, out, device, dtype, skip, force, as_json, unused)
        return
    with live.quantizing(reports()) as told:
        imports.load()
        from optq.config import ModelConfig
        from optq.core.gptq import BEST
        from optq.model.head import with_own_head
        from optq.plan import Skeleton
        from optq.runner import Runner

        config, skeleton = ModelConfig(model, device, dtype), None
        options = {"sym": sym, "mse": mse, "percdamp": percdamp, "polish": polish}
        options |= {"actorder": actorder, "static_groups": static_groups}
        budget = {"bits_per_weight": bits_per_weight, "size": size("--size", in_all)}
        if sum((plain, fast, best)) > 1:
            raise SettingError(
                "--plain, --fast and --best exclude each other", "choose one of them"
            )
        if method != "gptq":
            named = {"fast": fast or None, "best": best or None}
            refuse_given(named, method, "leave it out, or use --method gptq")
        if fast and qep:
            raise SettingError("--fast leaves out what --qep asks for", "choose one of them")
        if best and tune is None:
            tune = "model"
        activations = abits, alpha
        quantizer = solver_of(method, wbits, budget, groupsize, plain, options, *activations)
        weights_only = quantizer.scheme().abits is None
        if not weights_only:
            named = {"fast": fast or None, "best": best or None}
            refuse_given(named, "a run with --abits", "leave it out")
        file_format = file_format or ("gptq" if weights_only else "compressed-tensors")
        if groupsize is None or dry_run:
            checkpoint = with_own_head(config.plain_checkpoint(not dry_run), head, untie)
            skeleton = Skeleton.of(checkpoint, skip, head)
        if groupsize is None and weights_only and skeleton:
            quantizer = replace(quantizer, groupsize=fitting_groupsize(skeleton.blocks))
        if qep is None:
            usual = method == "gptq" and weights_only and not (plain or fast)
            qep = usual and BEST[wbits or DEFAULT_WBITS].qep
        memory = size("--activation-memory", activation_memory)
        calib = ("demo" if config.is_demo else "c4") if calib is None else calib
        runner = Runner(
            config,
            quantizer,
            qep=qep,
            tune=tune,
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
        if not dry_run:
            told.begin()
            runner.progress, runner.tuning, runner.reading = told.solved, told.tuning, told.reading
            result = runner.run()
    if dry_run:
        plan = runner.plan(skeleton)
        facts = {"model": model, "out": str(out), "method": method, "qep": bool(qep), "head": head}
        facts["tune"] = tune
        facts |= {"groupsize": quantizer.groupsize, "sym": quantizer.sym}
        settings = {"format": file_format} | facts | asdict(quantizer)
        outcome.of_plan(plan, settings, out, as_json)
        return
    if not reports():
        return
    if groupsize is None and weights_only:
        tell_groupsize(quantizer.groupsize)
    if as_json:
        settings = {"model": model, "out": str(out), "method": method, "qep": bool(qep)}
        settings |= {
            "head": head,
            "tune": result.record.tune,
            "wbits": None,
            "actorder": False,
            "percdamp": None,
            "groupsize": quantizer.groupsize,
            "sym": quantizer.sym,
        }
        outcome.as_object(result, settings | asdict(quantizer))
        return
    if result.choices is not None:
        tables.widths(tables.chosen(result.choices))
    outcome.as_tables(result, out, file_format, "quantized", "round-to-nearest", calib)
    outcome.next_steps(out, model, calib)
