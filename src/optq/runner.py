"""Quantize a model: the whole story on one page.

    Runner(ModelConfig(model_id="folder"), GPTQ(wbits=4, groupsize=128), output="out").run()

Open the checkpoint, read calibration tokens, and let :mod:`optq.model.flow` take the model
through its own forward. At each site the stacked weights of its layers meet the Hessian of their
common input, the quantizer turns both into codes, and the dequantized weights go back into the
model, so that everything behind them sees the error made so far. Codes go to disk block by block.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optq import __version__
from optq.core.gptq import GPTQ
from optq.core.grid import Storage
from optq.core.hessian import output_energy
from optq.core.obq import OBQ
from optq.core.qep import QEP
from optq.core.rtn import RTN
from optq.core.solution import Solution
from optq.data.calibration import calibration_tokens
from optq.errors import ModelError, NumericsError, SettingError
from optq.formats import FORMATS
from optq.formats.gptq import GPTQFormat, detect
from optq.formats.reader import load
from optq.formats.writer import Writer, check_target
from optq.model.blocks import Block, Layer, find_blocks, release
from optq.model.flow import Flow, Inputs, Site
from optq.model.source import Checkpoint, disk_names, load_model, load_tokenizer, positions

METHODS = {"rtn": RTN, "gptq": GPTQ, "obq": OBQ}
Quantizer = RTN | GPTQ | OBQ
BATCH_TOKENS = 4096  # of one coroutine: enough to keep matrix products busy


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and where it is quantized.

    ``model_id``: a folder, a hub id, or ``demo``. ``device``: ``auto`` (the first GPU, else the
    CPU) or what ``torch.device`` takes.
    """

    model_id: str
    device: str = "auto"

    @property
    def is_demo(self) -> bool:
        return self.model_id == "demo"

    def checkpoint(self) -> Checkpoint:
        """The checkpoint on disk."""
        if self.is_demo:
            from optq.demo import MODEL

            return Checkpoint.open(str(MODEL))
        return Checkpoint.open(str(self.model_id))

    def load(self) -> tuple[Any, Any]:
        """The model on its device, quantized or not, and its tokenizer."""
        device, checkpoint = self.torch_device(), self.checkpoint()
        return load(checkpoint).to(device), load_tokenizer(checkpoint)

    def torch_device(self) -> torch.device:
        """The device, checked to be there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise SettingError(
                f"the device {self.device} is not here", "choose cpu, or auto"
            ) from error
        return device


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer.

    ``error`` is ``tr((W - Q) H (W - Q)^T)``: the mean squared output error per token, summed over
    rows; ``relative_error`` divides it by ``tr(W H W^T)``, ``rtn_error`` is round-to-nearest's.
    """

    name: str
    rows: int
    cols: int
    error: float
    relative_error: float
    rtn_error: float
    damp: float
    seconds: float
    damp_tries: int = 0
    dead_columns: int = 0
    fallback_rows: int = 0
    calls: int = 1  # of the layer in one forward; it is calibrated on the first


@dataclass(frozen=True)
class Progress:
    """One site is solved."""

    block: int
    blocks: int
    site: str  # its first layer
    layers: list[LayerRecord]


@dataclass
class Result:
    """A finished run: ``layers`` are its records, ``seconds`` where its time went."""

    layers: list[LayerRecord]
    dense: list[str]  # linear layers inside the blocks that stay as they were
    seconds: dict[str, float]
    bits_per_weight: float  # of the quantized layers, scales and all
    bytes: int  # of the quantized layers in the file
    record: dict[str, Any]  # what goes into the checkpoint's optq.json
    output: Path | None
    _model: Any
    _write: Callable[[Path, bool], None]

    @cached_property
    def model(self) -> Any:
        """The quantized model; its layers hold dequantized weights."""
        return self._model or load(Checkpoint.open(str(self.output)))

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the checkpoint to the folder ``path``; for a run without ``output``."""
        self._write(Path(path), force)


@dataclass
class Runner:
    """One quantization run.

    ``calib`` is a SPEC of :mod:`optq.data` (default: ``c4``, and ``demo`` for the bundled model)
    or token ids ``[samples, tokens]``; ``output`` a folder to write as the run goes (without it
    the result keeps everything and can ``save``); ``seqlen`` defaults to 2048, or to the model's
    positions if those are fewer; ``skip`` is a regular expression of layers to leave dense;
    ``chat`` passes the text through the tokenizer's chat template; ``qep`` is True or a
    :class:`QEP`; ``progress`` is called after each site.
    """

    model_config: ModelConfig
    quantizer: Quantizer
    qep: bool | QEP = False
    calib: str | Path | Tensor | None = None
    output: str | Path | None = None
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    format: str = "gptq"
    skip: str | None = None
    chat: bool = False
    force: bool = False
    progress: Callable[[Progress], None] = lambda _: None

    def run(self) -> Result:
        """Quantize. Raises an :class:`optq.errors.OptqError` for all that a user can put right."""
        started = time.perf_counter()
        if self.format not in FORMATS:
            raise SettingError(
                f"the format {self.format} is unknown", f"choose {' or '.join(FORMATS)}"
            )
        form, device = FORMATS[self.format], self.model_config.torch_device()
        checkpoint = self.model_config.checkpoint()
        if detect(checkpoint.config()):
            raise ModelError(f"{checkpoint.folder} is quantized already", "give the plain model")
        if self.output is not None:
            check_target(Path(self.output), checkpoint, self.force)
        model = load_model(checkpoint)
        blocks = find_blocks(model, self.skip)
        for layer in (layer for block in blocks for layer in block.layers):
            form.check(layer.name, *layer.shape, self.quantizer.wbits, self.quantizer.groupsize)
        tokens = self._tokens(checkpoint, model)
        work = _Work(self, checkpoint, model, blocks, form)
        work.seconds["load"] = time.perf_counter() - started
        if self.output is None:
            work.calibrate(tokens, device)
        else:
            with Writer(Path(self.output), checkpoint, form, self.force) as work.writer:
                work.calibrate(tokens, device)
                work.finish(work.writer)
        return work.result(time.perf_counter() - started)

    def _tokens(self, checkpoint: Checkpoint, model: Any) -> Tensor:
        seqlen = sequence_length(model, self.seqlen)
        if isinstance(self.calib, Tensor):
            return calibration_tokens(self.calib, None, self.nsamples, seqlen, self.seed)
        calib = self.calib or ("demo" if self.model_config.is_demo else "c4")
        tokenizer = load_tokenizer(checkpoint)
        return calibration_tokens(
            str(calib), tokenizer, self.nsamples, seqlen, self.seed, chat=self.chat
        )


def sequence_length(model: Any, seqlen: int | None) -> int:
    """``seqlen``, checked against the model's positions; 2048 by default, if it has so many."""
    longest = positions(model)
    if seqlen is None:
        return min(2048, longest or 2048)
    if longest is not None and seqlen > longest:
        raise SettingError(
            f"seqlen {seqlen} is more than the model's {longest} positions",
            f"choose {longest} or less",
        )
    return seqlen


class _Work:
    """A run under way: solves each site that the flow brings, and keeps the records."""

    def __init__(
        self,
        runner: Runner,
        checkpoint: Checkpoint,
        model: Any,
        blocks: list[Block],
        form: GPTQFormat,
    ) -> None:
        self.runner, self.checkpoint, self.model, self.blocks = runner, checkpoint, model, blocks
        self.form = form
        self.storage: Storage = form.storage(model.dtype)
        self.qep = QEP() if runner.qep is True else runner.qep or None
        self.names = disk_names(model, checkpoint.files)
        for layer in (layer for block in blocks for layer in block.layers):
            if f"{layer.name}.weight" not in self.names:
                raise ModelError(
                    f"{layer.name} is not on disk as one tensor", "leave it dense with --skip"
                )
        self.writer: Writer | None = None
        self.solutions: dict[str, Solution] = {}  # without a writer: all of them, for save()
        self.records: list[LayerRecord] = []
        self.bytes = self.weights = 0
        self.seconds = dict.fromkeys(
            ("total", "forward", "hessian", "factor", "solve", "write"), 0.0
        )

    def calibrate(self, tokens: Tensor, device: torch.device) -> None:
        """Take all calibration tokens ``[samples, tokens]`` through the model once."""
        self.tokens = tokens
        batches = list(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])))
        propagate = self.qep is not None
        flow = Flow(self.model, self.blocks, batches, device, self.solve, self.done, propagate)
        flow.run()
        self.seconds["forward"] = flow.seconds.forward
        self.seconds["hessian"] = flow.seconds.hessian

    def solve(self, site: Site, inputs: Inputs) -> None:
        """Quantize the stacked rows of one site and put the weights back."""
        for layer in site.layers:
            if not torch.isfinite(layer.weight).all():
                raise NumericsError(
                    f"the weight of {layer.name} (block {site.block.index}) holds NaN or infinity",
                    "copy the model again, or train it again",
                )
        weight = torch.cat([layer.weight for layer in site.layers])
        target = weight
        if self.qep is not None and inputs.cross is not None:
            weight = weight.float()
            target = self.qep.correct(weight, inputs.H, inputs.cross)
        solution = self.runner.quantizer.solve(target, inputs.H, self.storage)
        if target is not weight:  # errors are the original weight's
            solution = _measured_on(weight, inputs.H, solution, self.runner.quantizer, self.storage)
        rows = [layer.shape[0] for layer in site.layers]
        energies = output_energy(weight, inputs.H).split(rows)
        records = []
        for layer, part, energy in zip(site.layers, solution.split(rows), energies, strict=True):
            layer.put(part.weight)
            self._keep(layer, part)
            records.append(_record(layer, part, energy.sum().item(), len(weight)))
        self.records += records
        for stage in ("factor", "solve"):
            self.seconds[stage] += solution.seconds[stage]
        self.runner.progress(
            Progress(site.block.index, len(self.blocks), site.layers[0].name, records)
        )

    def done(self, block: Block) -> None:
        """A block that no batch needs any more: with a writer, its weights may go."""
        if self.writer is not None:
            release(block, self.blocks)
        else:
            block.module.to("cpu")

    def finish(self, writer: Writer) -> None:
        """Complete the checkpoint."""
        start = time.perf_counter()
        writer.finish(self.runner.quantizer, self._dense_on_disk(), self._settings())
        self.seconds["write"] += time.perf_counter() - start

    def result(self, total: float) -> Result:
        self.seconds["total"] = total
        output = None if self.runner.output is None else Path(self.runner.output)
        return Result(
            layers=self.records,
            dense=self._dense(),
            seconds=self.seconds,
            bits_per_weight=8 * self.bytes / max(self.weights, 1),
            bytes=self.bytes,
            record=self._settings(),
            output=output,
            _model=self.model if output is None else None,
            _write=self._save,
        )

    def _keep(self, layer: Layer, part: Solution) -> None:
        start = time.perf_counter()
        name = self.names[f"{layer.name}.weight"].removesuffix(".weight")
        tensors = self.form.encode(part)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        self.weights += part.codes.numel()
        if self.writer is None:
            self.solutions[name] = part
        else:
            self.writer.add(name, part, tensors)
        self.seconds["write"] += time.perf_counter() - start

    def _save(self, path: Path, force: bool) -> None:
        if self.writer is not None:
            raise SettingError(f"the run wrote {self.writer.target} already", "copy that folder")
        with Writer(path, self.checkpoint, self.form, force) as writer:
            for name, solution in self.solutions.items():
                writer.add(name, solution, self.form.encode(solution))
            self.finish(writer)

    def _dense(self) -> list[str]:
        solved = {record.name for record in self.records}
        return [name for block in self.blocks for name in block.linears if name not in solved]

    def _dense_on_disk(self) -> list[str]:
        return [
            self.names[f"{name}.weight"].removesuffix(".weight")
            for name in self._dense()
            if f"{name}.weight" in self.names
        ]

    def _settings(self) -> dict[str, Any]:
        """What the checkpoint says of its making. No times and no paths: same seed, same bytes."""
        runner = self.runner
        calib = "token ids" if isinstance(runner.calib, Tensor) else Path(runner.calib or "").name
        return {
            "optq": __version__,
            "method": type(runner.quantizer).__name__.lower(),
            "quantizer": asdict(runner.quantizer),
            "qep": None if self.qep is None else asdict(self.qep),
            "calibration": {
                "text": calib or "default",
                "samples": self.tokens.shape[0],
                "seqlen": self.tokens.shape[1],
                "seed": runner.seed,
            },
            "bits_per_weight": 8 * self.bytes / max(self.weights, 1),
            "bytes": self.bytes,
            "dense": self._dense(),
            "layers": [
                {key: value for key, value in asdict(record).items() if key != "seconds"}
                for record in self.records
            ],
        }


def _measured_on(
    weight: Tensor, H: Tensor, solution: Solution, quantizer: Quantizer, storage: Storage
) -> Solution:
    """``solution`` with the errors it makes on ``weight``, not on the target it was solved for."""
    grid = quantizer.grid
    rounding = RTN(grid.wbits, grid.groupsize, grid.sym, grid.mse).solve(weight, H, storage)
    miss = weight - solution.weight
    return replace(
        solution,
        error=((miss @ H) * miss).sum(1).clamp(min=0),
        rtn_error=rounding.error,
    )


def _record(layer: Layer, part: Solution, energy: float, site_rows: int) -> LayerRecord:
    rows, cols = layer.shape
    error = part.error.sum().item()
    return LayerRecord(
        name=layer.name,
        rows=rows,
        cols=cols,
        error=error,
        relative_error=error / energy if energy else 0.0,
        rtn_error=part.rtn_error.sum().item(),
        damp=part.damp,
        seconds=sum(part.seconds.values()) * rows / site_rows,
        damp_tries=part.damp_tries,
        dead_columns=part.dead,
        fallback_rows=part.fallback_rows,
        calls=max(layer.calls, 1),
    )
