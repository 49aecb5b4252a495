"""The command: flags become objects. Nothing here imports torch before a command runs."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from optq import __version__
from optq.errors import OptqError, SettingError

if TYPE_CHECKING:
    from optq.quantize import Quantizer

app = typer.Typer(
    name="optq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or 'demo'.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ..")]
Seqlen = Annotated[
    int | None, typer.Option(help="Tokens in a sequence: 2048, or the model's positions if fewer.")
]
FORMATS_HELP = "gptq, gptq_v2, compressed-tensors"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def main() -> NoReturn:
    """Run the command: exit status 0 done, 2 bad input, 1 a defect, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `kill` cleans up as well
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # newer versions of typer turn Ctrl-C into this code themselves
            _interrupted()
    except OptqError as error:
        _say(error.cause, error.remedy)
        code = 2
    except BrokenPipeError:  # of `optq .. | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
        code = 130
    except Exception as error:
        # typer brings its own copy of click or shares one, depending on its version: its usage
        # errors are known by what they can do.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        code = error.exit_code
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize the weights of language models to 2, 3, 4 or 8 bits with GPTQ."""


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
        for row in rows:
            del row["rise"], row["seconds"]
        _print_json({"model": "demo", "rows": rows})
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
        bool | None, typer.Option(help="Columns of large activations first.")
    ] = None,
    static_groups: Annotated[
        bool | None, typer.Option(help="Fit all grids beforehand: act-order costs nothing then.")
    ] = None,
    mse: Annotated[bool | None, typer.Option(help="Search the range of each grid.")] = None,
    polish: Annotated[
        int | None, typer.Option(help="Rounds that mend codes and scales after the sweep.")
    ] = None,
    percdamp: Annotated[float, typer.Option(help="Damping, of the mean of diag H.")] = 0.01,
    qep: Annotated[bool, typer.Option("--qep", help="Error propagation.")] = False,
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
            record | {"seconds": layer.seconds}
            for record, layer in zip(layers, result.layers, strict=True)
        ]
        _print_json(
            {
                "model": model,
                "out": str(out),
                "method": method,
                "wbits": wbits,
                "groupsize": groupsize,
                "sym": sym,
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


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(help="As --calib of quantize. Default: wikitext2; demo for the demo model."),
    ] = None,
    seqlen: Seqlen = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL, quantized or not, by the paper's protocol."""
    from optq.compare import measure
    from optq.report import progress, tables
    from optq.runner import ModelConfig

    config = ModelConfig(model, device)
    text = text or ("demo" if config.is_demo else "wikitext2")
    with progress.bar("perplexity") as bar:
        result, seqlen = measure(config, text, seqlen, bar.update)
    if as_json:
        _print_json(
            {
                "model": model,
                "text": text,
                "seqlen": seqlen,
                "tokens": result.tokens,
                "perplexity": result.perplexity,
            }
        )
        return
    tables.facts(
        {
            "perplexity": f"{result.perplexity:.4f}",
            "text": f"{text}, {result.windows} windows of {seqlen} tokens",
        }
    )


@app.command()
def compare(
    model: Model,
    methods: Annotated[
        str, typer.Option(help="Of rtn, plain (the paper's GPTQ), gptq, qep.")
    ] = "rtn,plain,gptq,qep",
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

    from optq.compare import Comparison, write_chart
    from optq.report import progress, tables
    from optq.runner import ModelConfig

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
        rows = comparison.run(results, bar.update)
    if chart is not None:
        write_chart(chart, model, rows)
    if as_json:
        _print_json({"model": model, "rows": [asdict(row) for row in rows]})
    else:
        tables.compared([asdict(row) for row in rows])


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    compare: Annotated[
        str | None, typer.Option(help="Another model: both texts and speeds side by side.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Continue PROMPT with MODEL, quantized or not, taking the likeliest token each time."""
    from optq.evaluate.generate import Completion, Speed
    from optq.report import tables
    from optq.runner import ModelConfig

    def complete(name: str, show: Callable[[str], object]) -> tuple[str, Speed]:
        """The whole text and its speed; only one model is in memory at a time."""
        completion = Completion(*ModelConfig(name, device).load(), prompt, max_new_tokens)
        text = ""
        with closing(completion.__iter__()) as pieces:
            for piece in pieces:
                show(piece)
                text += piece
        return text, completion.speed

    if compare is not None:
        names = (model, compare)
        tables.completions(prompt, names, [complete(name, lambda _: None) for name in names])
        return
    _, speed = complete(model, lambda piece: print(piece, end="", flush=True))
    print()
    print(f"optq: {speed}", file=sys.stderr)


@app.command()
def bench(
    model: Model,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Speed and memory of the quantized MODEL, beside the same model with dense weights."""
    from dataclasses import asdict

    from optq.evaluate.speed import measure_speed
    from optq.report import progress, tables
    from optq.runner import load

    with progress.bar("optq bench") as bar:
        report = measure_speed(load(model, device), bar.update)
    if as_json:
        _print_json({"model": model, **asdict(report)})
    else:
        tables.speed(report)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; for gguf, the file.")],
    form: Annotated[str, typer.Option("--format", help=f"{FORMATS_HELP} or gguf.")],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the quantized checkpoint MODEL in another format, with the same codes and grids."""
    from optq.formats import FORMATS
    from optq.formats.export import export as convert
    from optq.report import tables
    from optq.runner import ModelConfig

    if form not in (*FORMATS, "gguf"):
        raise SettingError(f"the format {form} is unknown", f"choose {', '.join(FORMATS)} or gguf")
    checkpoint = ModelConfig(model).checkpoint()
    if form == "gguf":
        from optq.formats.gguf import export_gguf

        tables.facts({"wrote": out, **export_gguf(checkpoint, out, force)})
        return
    layers = convert(checkpoint, out, FORMATS[form], force)
    tables.facts({"wrote": out, "format": form, "layers": layers, "next": f"optq inspect {out}"})


@app.command()
def inspect(
    model: Model,
    as_json: Json = False,
) -> None:
    """What is in a checkpoint: bits, groups, sizes, errors by layer."""
    from optq.formats.describe import describe
    from optq.report import tables
    from optq.runner import ModelConfig

    what = describe(ModelConfig(model).checkpoint())
    if as_json:
        _print_json(what)
        return
    tables.checkpoint(what)


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


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, allow_nan=False))


def _interrupted() -> None:
    _say("interrupted", "nothing half-written was left behind: run the command again")


def _say(cause: str, remedy: str) -> None:
    print(f"optq: {cause}", file=sys.stderr)
    print(f"      {remedy}", file=sys.stderr)
