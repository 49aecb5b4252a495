"""The command that shows what became of a checkpoint: report."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optq.cli.app import app
from optq.cli.options import Model

if TYPE_CHECKING:
    from optq.report.page.known import Known


@app.command()
def report(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="The model as it was: its size, and how to measure against.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--with", help="Another checkpoint of the same model; several times."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: optq_report.html in MODEL.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is no report.")
    ] = False,
) -> None:
    """One HTML page about the quantized MODEL: size, loss, errors by layer, who loads it."""
    from optq.report import steps, tables
    from optq.report.page import build
    from optq.report.page.known import Several

    path = out or Path(model if Path(model).is_dir() else ".") / build.FILE
    build.check(path, force)
    several = Several([known(name, against) for name in (model, *(beside or ()))])
    build.write(path, build.page(several))
    tables.facts({"wrote": f"{path}  ({tables.size(path.stat().st_size)})"})
    if open_it:
        webbrowser.open(path.resolve().as_uri())
    steps.show(_next(several.every[0]))


def known(model: str, against: str | None = None) -> Known:
    """What is on disk of a checkpoint, and how large it was before."""
    from optq.config import ModelConfig
    from optq.errors import ModelError, SettingError
    from optq.findings import FILE, Findings
    from optq.formats.describe import describe, weights
    from optq.record import FILE as RECORD
    from optq.record import TIMES, RunRecord, Times
    from optq.report.page.known import Known, different

    checkpoint = ModelConfig(model).checkpoint()
    what, folder, config = describe(checkpoint), checkpoint.folder, checkpoint.config()
    if "quantized_layers" not in what:
        raise ModelError(f"{model} is not quantized", "give what optq quantize wrote")
    count, before = weights(checkpoint)
    if against is not None:
        dense = ModelConfig(against).plain_checkpoint(whole=False)
        if why := different(config, dense.config()):
            raise SettingError(
                f"{against} is not the model that {model} was: {why}", "name that one"
            )
        before = sum(tensor.nbytes for tensor in dense.layout.values())
    record, found, times = folder / RECORD, folder / FILE, folder / TIMES
    return Known(
        place=model,
        config=config,
        what=what,
        before=before,
        exact=against is not None,
        weights=count,
        dense=against,
        record=RunRecord.read(record) if record.is_file() else None,
        times=Times.read(times) if times.is_file() else None,
        findings=Findings.read(found) if found.is_file() else None,
    )


def _next(first: Known) -> str:
    """Measure what is not measured; else use it."""
    from optq.report import steps
    from optq.report.page.summary import command_to_measure

    return command_to_measure(first) or steps.command("generate", first.place, "PROMPT")
