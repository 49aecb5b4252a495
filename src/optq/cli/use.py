"""Commands that take a model as it is: generate, bench, export, inspect."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optq.cli import imports
from optq.cli.app import app, print_json, refuse_given, say
from optq.cli.options import FORMATS_HELP, Device, Dtype, Json, Model
from optq.errors import SettingError


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    compare: Annotated[
        str | None, typer.Option(help="Another model: both texts and speeds side by side.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Continue PROMPT with MODEL, quantized or not, taking the likeliest token each time."""
    imports.load()
    from optq.config import ModelConfig
    from optq.evaluate.generate import Completion, Speed
    from optq.report import tables

    def complete(name: str, show: Callable[[str], object]) -> tuple[str, Speed]:
        """The whole text and its speed; only one model is in memory at a time."""
        completion = Completion(*ModelConfig(name, device, dtype).load(), prompt, max_new_tokens)
        return completion.run(show), completion.speed

    if compare is not None:
        names = (model, compare)
        tables.completions(prompt, names, [complete(name, lambda _: None) for name in names])
        return
    _, speed = complete(model, lambda piece: print(piece, end="", flush=True))
    print()
    print(f"optq: {speed}", file=sys.stderr)


@app.command()
def bench(model: Model, device: Device = "auto", as_json: Json = False) -> None:
    """Speed and memory of the quantized MODEL, beside the same model with dense weights."""
    from optq.report import progress, steps, tables

    with progress.bar("optq bench") as bar:
        bar(0, 1, "starting")
        imports.load()
        from optq.config import load
        from optq.evaluate.speed import measure_speed

        report = measure_speed(load(model, device), bar)
    if as_json:
        print_json({"model": model, **asdict(report)})
        return
    tables.speed(report)
    steps.show(steps.command("generate", model, "PROMPT"))


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; for gguf, the file.")],
    file_format: Annotated[str, typer.Option("--format", help=f"{FORMATS_HELP} or gguf.")],
    head: Annotated[
        int | None,
        typer.Option(help="Of gguf: embeddings, and a head not yet quantized, in 8 or 4 bits."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the quantized checkpoint MODEL in another format, with the same codes and grids."""
    imports.load()
    from optq.config import ModelConfig
    from optq.formats import FORMATS
    from optq.formats.export import export as convert
    from optq.report import said, steps, tables

    if file_format not in (*FORMATS, "gguf"):
        raise SettingError(
            f"the format {file_format} is unknown", f"choose {', '.join(FORMATS)} or gguf"
        )
    checkpoint = ModelConfig(model).checkpoint()
    if file_format == "gguf":
        from optq.formats.gguf import export_gguf

        tables.facts(said.exported(out, export_gguf(checkpoint, out, force, say, head)))
        steps.show(shlex.join(["llama-cli", "-m", str(out)]))
        return
    refuse_given({"head": head}, f"export --format {file_format}", "quantize with --head instead")
    layers = convert(checkpoint, out, FORMATS[file_format], force, say)
    tables.facts({"wrote": out, "format": file_format, "layers": layers})
    steps.show(steps.command("inspect", out))


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """What is in a checkpoint: who loads it, bits, groups, sizes, errors by layer."""
    imports.load()
    from optq.config import ModelConfig
    from optq.formats.describe import describe
    from optq.report import steps, tables

    what = describe(ModelConfig(model).checkpoint())
    if as_json:
        print_json(what)
        return
    tables.checkpoint(what)
    steps.show(steps.after_inspection(model, what))
