"""Commands that quantize: demo, quantize, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optq.cli.app import FORMATS_HELP, Device, Json, Model, Seqlen, app, print_json
from optq.errors import SettingError

if TYPE_CHECKING:
    from optq.quantize import Quantizer


@app.command()
def demo(
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Round-to-nearest beside GPTQ at 4, 3 and 2 bits, on the bundled model."""
    from dataclasses import asdict

    from optq.compare import demo_rows
    from optq.report import progress, tables

    with progress.bar("optq demo") as bar:
        rows = [asdict(row) for row in demo_rows(device, bar.update)]
    if as_json:
        print_json({"model": "demo", "rows": rows})
    else:
        tables.compared(rows)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    method: Annotated[str, typer.Option(help="gptq, rtn (round to nearest) or obq.")] = "gptq",
    wbits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    groupsize: Annotated[
        int, typer.Option(help="Columns that share a scale; -1: one scale to a row.")
    ] = 128,
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
    percdamp: Annotated[float, typer.Option(help="Damping, of the mean of diag H.")] = 0.01,
    qep: Annotated[
        bool | None,
        typer.Option(help="Error propagation, twice the forward time. Default: below 8 bits."),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="demo, a .txt or .jsonl file, wikitext2, ptb, c4, NAME:SPLIT:COLUMN."
            " Default: c4; demo for the bundled model."
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the calibration sequences.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    skip: Annotated[str | None, typer.Option(help="Regex of layers to leave dense.")] = None,
    device: Device = "auto",
    form: Annotated[str, typer.Option("--format", help=f"{FORMATS_HELP}.")] = "gptq",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and write the checkpoint OUT."""
    from optq.report import progress, tables

    options = {"sym": sym, "mse": mse, "percdamp": percdamp, "polish": polish}
    options |= {"actorder": actorder, "static_groups": static_groups}
    quantizer = _quantizer(method, wbits, groupsize, plain, options)
    from optq.core.best import BEST

    if qep is None:
        qep = method == "gptq" and not plain and BEST[wbits].qep
    from optq.quantize import Progress
    from optq.runner import ModelConfig, Runner

    calib = calib or ("demo" if model == "demo" else "c4")
    with progress.bar("quantizing") as bar:
        bar.update(0, 1, "reading model and text")

        def solved(step: Progress) -> None:
            worst = max(step.layers, key=lambda layer: layer.relative_error)
            note = f"{step.site} error {worst.relative_error:.2%}"
            bar.update(step.block, step.blocks, note)

        result = Runner(
            ModelConfig(model, device),
            quantizer,
            qep=qep,
            calib=calib,
            output=out,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            format=form,
            skip=skip,
            chat=chat,
            force=force,
            progress=solved,
        ).run()
    layers, made = result.record["layers"], result.record["calibration"]
    if as_json:
        timed = [
            record | {"seconds": layer.seconds, "polish_seconds": layer.polish_seconds}
            for record, layer in zip(layers, result.layers, strict=True)
        ]
        print_json(
            {
                "model": model,
                "out": str(out),
                "method": method,
                "wbits": wbits,
                "groupsize": groupsize,
                "sym": sym,
                "qep": bool(qep),
                "actorder": getattr(quantizer, "actorder", False),
                "percdamp": percdamp,
                "bits_per_weight": result.bits_per_weight,
                "bytes": result.bytes,
                "seconds": result.seconds,
                "layers": timed,
            }
        )
        return
    weights = sum(layer.rows * layer.cols for layer in result.layers)
    total, rounding = (
        sum(getattr(layer, name) for layer in result.layers) for name in ("error", "rtn_error")
    )
    tables.stages(result.seconds)
    tables.facts(
        {
            "wrote": f"{out}  ({form}, {result.bits_per_weight:.2f} bits per weight)",
            "layers": f"{len(result.layers)} quantized, {tables.size(result.bytes)} for"
            f" {weights / 1e6:.1f} million weights; {len(result.dense)} linear layers left dense",
            "error": f"{total / rounding:.0%} of round-to-nearest's" if rounding else "0",
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
    groupsize: Annotated[str, typer.Option(help="-1: one scale to a row.")] = "128",
    calib: Annotated[str | None, typer.Option(help="As of quantize.")] = None,
    text: Annotated[str | None, typer.Option(help="Held-out text, as --text of eval.")] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the calibration sequences.")] = 0,
    device: Device = "auto",
    results: Annotated[
        Path, typer.Option(help="Rows that are done: the same command goes on from them.")
    ] = Path("optq-compare.jsonl"),
    chart: Annotated[Path | None, typer.Option(help="An SVG to draw.")] = None,
    as_json: Json = False,
) -> None:
    """Many settings on MODEL with one calibration: size, perplexity, rise, seconds."""
    from dataclasses import asdict

    from optq.compare import Comparison
    from optq.report import chart as svg
    from optq.report import progress, tables
    from optq.runner import ModelConfig

    if chart is not None:
        svg.check(chart)
    config = ModelConfig(model, device)
    comparison = Comparison(
        config,
        _words("--methods", methods),
        [_number("--wbits", word) for word in _words("--wbits", wbits)],
        [_number("--groupsize", word) for word in _words("--groupsize", groupsize)],
        calib or ("demo" if config.is_demo else "c4"),
        text or ("demo" if config.is_demo else "wikitext2"),
        nsamples,
        seqlen,
        seed,
    )
    with progress.bar("optq compare") as bar:
        rows = [asdict(row) for row in comparison.run(results, bar.update)]
    if chart is not None:
        svg.write(chart, model, rows)
    if as_json:
        print_json({"model": model, "rows": rows})
    else:
        tables.compared(rows)


def _quantizer(
    method: str, wbits: int, groupsize: int, plain: bool, options: dict[str, Any]
) -> Quantizer:
    """The solver, with those options that it has; one that it lacks must not be asked for."""
    from dataclasses import fields

    from optq.core.gptq import GPTQ
    from optq.runner import METHODS

    if method not in METHODS:
        raise SettingError(f"the method {method} is unknown", f"choose {', '.join(METHODS)}")
    solver = METHODS[method]
    known = {field.name for field in fields(solver)}
    asked = {name for name, value in options.items() if value and name != "percdamp"} - known
    if plain and solver is not GPTQ:
        asked.add("plain")
    if asked:
        flag = min(asked).replace("_", "-")
        raise SettingError(f"{method} has no --{flag}", "leave it out, or use --method gptq")
    chosen = {name: v for name, v in options.items() if name in known and v is not None}
    build = GPTQ.plain if plain else solver
    return build(wbits=wbits, groupsize=groupsize, **chosen)


def _words(flag: str, text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise SettingError(f"{flag} is empty", "give one or more, with commas between")
    return words


def _number(flag: str, word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise SettingError(
            f"{flag} {word} is no number", "give numbers, with commas between"
        ) from None
