"""Commands that take a model as it is: eval, generate, bench, export, inspect."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from optq.cli.app import app, print_json, refuse_given, say, words
from optq.cli.options import FORMATS_HELP, Device, Dtype, Json, Model, Seqlen
from optq.errors import SettingError


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(help="As --calib of quantize. Default: wikitext2; demo for the demo model."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks of lm-eval (piqa,arc_easy,..); of a text too if named."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task at most.")] = None,
    seqlen: Seqlen = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL, quantized or not, by the paper's protocol; or its scores in tasks."""
    from optq.config import ModelConfig
    from optq.data.evaluation import evaluation_tokens
    from optq.evaluate.perplexity import perplexity
    from optq.evaluate.tasks import ZeroShot
    from optq.model.source import sequence_length
    from optq.report import progress, tables

    config = ModelConfig(model, device, dtype)
    if tasks is None:
        refuse_given({"limit": limit}, "eval without --tasks", "name tasks, or leave it out")
    elif text is None:
        refuse_given({"seqlen": seqlen}, "eval of --tasks alone", "add --text, or leave it out")
    shots = None if tasks is None else ZeroShot(words("--tasks", tasks), limit)
    found: dict[str, Any] = {"model": model}
    facts: dict[str, object] = {}
    loaded, tokenizer = config.load()
    if tasks is None or text is not None:
        text = ("demo" if config.is_demo else "wikitext2") if text is None else text
        seqlen = sequence_length(loaded, seqlen)
        with progress.bar("perplexity") as bar:
            windows = evaluation_tokens(
                text, tokenizer, seqlen, lambda n, of: bar(0, 1, f"reading text: {n} of {of}")
            )
            note = f"{len(windows)} windows of {seqlen} tokens"
            result = perplexity(loaded, windows, progress=lambda n, of: bar(n, of, note))
        found |= {"text": text, "seqlen": seqlen}
        found |= {"tokens": result.tokens, "perplexity": result.perplexity}
        facts |= {"perplexity": f"{result.perplexity:.4f}", "text": f"{text}, {note}"}
    if shots is not None:
        found["tasks"] = shots.run(loaded, tokenizer)
        for task, scores in found["tasks"].items():
            for metric, score in scores.items():
                facts[f"{task} {metric}"] = "-" if score is None else f"{score:.4f}"
    print_json(found) if as_json else tables.facts(facts)


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
    from optq.config import load
    from optq.evaluate.speed import measure_speed
    from optq.report import progress, steps, tables

    with progress.bar("optq bench") as bar:
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
    from optq.config import ModelConfig
    from optq.formats.describe import describe
    from optq.report import steps, tables

    what = describe(ModelConfig(model).checkpoint())
    if as_json:
        print_json(what)
        return
    tables.checkpoint(what)
    steps.show(steps.after_inspection(model, what))
