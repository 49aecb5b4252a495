"""Commands that take a model as it is: eval, generate, bench, export, inspect."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from optq.cli.app import FORMATS_HELP, Device, Json, Model, Seqlen, app, print_json
from optq.errors import SettingError


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
    from optq.data.evaluation import evaluation_tokens
    from optq.evaluate.perplexity import perplexity
    from optq.model.source import sequence_length
    from optq.report import progress, tables
    from optq.runner import ModelConfig

    config = ModelConfig(model, device)
    text = text or ("demo" if config.is_demo else "wikitext2")
    with progress.bar("perplexity") as bar:
        loaded, tokenizer = config.load()
        seqlen = sequence_length(loaded, seqlen)
        windows = evaluation_tokens(text, tokenizer, seqlen)
        note = f"{len(windows)} windows of {seqlen} tokens"
        result = perplexity(loaded, windows, progress=lambda n, of: bar.update(n, of, note))
    if as_json:
        print_json(
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
            "text": f"{text}, {note}",
        }
    )


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
        return completion.run(show), completion.speed

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
        print_json({"model": model, **asdict(report)})
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
        print_json(what)
        return
    tables.checkpoint(what)
