"""The command that shows what became of a checkpoint: report."""

from __future__ import annotations

import shlex
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optq.cli import imports
from optq.cli.app import app, say
from optq.cli.options import Model
from optq.errors import ModelError, OtherMethodError, OutputError, SettingError

if TYPE_CHECKING:
    from optq.compare import Row
    from optq.model.checkpoint import Checkpoint
    from optq.report.page.known import Known
    from optq.result import Result


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
    """One HTML page about the quantized or pruned MODEL: size, loss, errors, who loads it."""
    imports.load()
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
    steps.show(_next(several.every[0], path))


def known(model: str, against: str | None = None) -> Known:
    """What is on disk of a checkpoint, and how large it was before."""
    from optq.config import ModelConfig
    from optq.findings import FILE, Findings
    from optq.formats.describe import weights
    from optq.record import FILE as RECORD
    from optq.record import TIMES, RunRecord, Times
    from optq.report.page.known import Known, different

    checkpoint = ModelConfig(model).checkpoint()
    what, folder, config = _described(checkpoint), checkpoint.folder, checkpoint.config()
    count, before = weights(checkpoint) if "quantized_layers" in what else (None, None)
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


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a method that is not read: its size, and who loads it. Raises for a model that nothing
    was done to.
    """
    from optq.formats.describe import describe
    from optq.formats.readers import who_loads

    try:
        what = describe(checkpoint)
    except OtherMethodError as error:
        config = checkpoint.config()
        method = (config.get("quantization_config") or {}).get("quant_method")
        return {
            "loads": [asdict(reader) for reader in who_loads(checkpoint)],
            "architecture": (config.get("architectures") or [config.get("model_type")])[0],
            "format": method or error.cause.removeprefix("the model is quantized with "),
            "unread": error.cause,
            "bytes": sum(tensor.nbytes for tensor in checkpoint.layout.values()),
        }
    if "quantized_layers" not in what and not what["layers"]:
        remedy = "give a folder that optq quantize or optq prune wrote"
        raise ModelError(f"{checkpoint.folder} is neither quantized nor pruned", remedy)
    return what


class DemoReport:
    """The report that ``optq demo`` leaves in the current folder, of its rows of GPTQ.

    The library of charts is made ready in the meantime.
    """

    FILE = Path("optq_demo.html")

    def __enter__(self) -> DemoReport:
        from optq.report.page import build

        self.found: list[Known] = []
        self.folder = TemporaryDirectory()
        self.pool = ThreadPoolExecutor(1)
        self.pool.submit(build.drawing)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.folder.cleanup()

    def add(self, row: Row, result: Result) -> None:
        """Keep what is known of a row."""
        from optq import __version__
        from optq.compare import DEMO_SEQLEN
        from optq.findings import Findings, OnText

        if row.method != "gptq":
            return
        name = f"demo at {row.wbits} bits"
        place = Path(self.folder.name) / name
        result.save(place)
        measured = row.perplexity
        text = OnText(text="demo", seqlen=DEMO_SEQLEN, tokens=0, perplexity=measured, losses=[])
        findings = Findings(optq=__version__, model=name, texts=[text])
        made = known(str(place), "demo")
        full = row.perplexity - row.rise
        self.found.append(replace(made, place=name, findings=findings, full=full))

    def write(self) -> Path | None:
        """The file; None, and a word why, where it cannot be written."""
        from optq.report.page import build
        from optq.report.page.known import Several

        if not self.found:
            return None
        try:
            build.check(self.FILE, False)
            build.write(self.FILE, build.page(Several(self.found)))
        except OutputError as error:
            say(f"no report: {error.cause}")
            return None
        return self.FILE


def _next(first: Known, page: Path) -> str:
    """Measure what is not measured, and use it; of what is not read there is the page to see."""
    from optq.report import steps
    from optq.report.page.summary import command_to_measure

    if "unread" in first.what:
        return f"open {shlex.quote(str(page))} in a browser"
    return command_to_measure(first) or steps.command("generate", first.place, "PROMPT")
