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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optq.core.qep import QEP
from optq.core.solver import Solver
from optq.data.calibration import calibration_tokens
from optq.errors import ModelError, SettingError
from optq.formats import FORMATS, detect, reader
from optq.formats.writer import Writer, check_target
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.source import check_vocabulary, load_model, load_tokenizer, sequence_length
from optq.quantize import LayerRecord, Progress, Quantization


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

    def plain_checkpoint(self) -> Checkpoint:
        """The same. Raises :class:`ModelError` where it is quantized already."""
        checkpoint = self.checkpoint()
        if detect(checkpoint.config()):
            raise ModelError(f"{checkpoint.folder} is quantized already", "give the plain model")
        return checkpoint

    def load(self) -> tuple[Any, Any]:
        """The model on its device, quantized or not, and its tokenizer."""
        device, checkpoint = self.torch_device(), self.checkpoint()
        return reader.load(checkpoint, device), load_tokenizer(checkpoint)

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
        if device.type not in ("cpu", "cuda"):
            raise SettingError(f"the device {self.device} is not supported", "choose cpu or cuda")
        return device


def load(path: str | Path, device: str = "auto") -> Any:
    """The transformers model in the folder ``path``, or of a hub id, ready to run on ``device``.

    Quantized layers stay packed and multiply through :mod:`optq.kernels`; gptq, gptq_v2 and
    compressed-tensors' pack-quantized are read, whoever wrote them. Raises
    :class:`optq.errors.ModelError` for a checkpoint that is damaged or of another method.
    """
    config = ModelConfig(str(path), device)
    return reader.load(config.checkpoint(), config.torch_device())


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
        """The quantized model, on the CPU: packed where the run wrote it, else dequantized."""
        return self._model or reader.load(Checkpoint.open(str(self.output)))

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
    :class:`QEP` (off unless asked for, where the command's default below 8 bits is True);
    ``progress`` is called after each site.
    """

    model_config: ModelConfig
    quantizer: Solver
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
        checkpoint = self.model_config.plain_checkpoint()
        if self.output is not None:
            check_target(Path(self.output), checkpoint, self.force)
        model = load_model(checkpoint)
        blocks = find_blocks(model, self.skip)
        qep = QEP() if self.qep is True else self.qep or None
        work = Quantization(model, blocks, checkpoint, self.quantizer, qep, form, self.progress)
        tokens = self._tokens(checkpoint, model)
        calibration = self._calibration(tokens)
        loaded = time.perf_counter() - started
        try:
            if self.output is None:
                work.calibrate(tokens, device)
            else:
                with Writer(Path(self.output), checkpoint, form, self.force) as work.writer:
                    work.calibrate(tokens, device)
                    work.finish(work.writer, calibration)
        except torch.OutOfMemoryError as error:
            raise SettingError(
                f"{device} has too little memory for {tokens.shape[0]} x {tokens.shape[1]} tokens",
                "choose fewer --nsamples, a shorter --seqlen, or --device cpu",
            ) from error

        def save(path: Path, force: bool) -> None:
            if work.writer is not None:
                raise SettingError(f"the run wrote {self.output} already", "copy that folder")
            with Writer(path, checkpoint, form, force) as writer:
                work.save(writer, calibration)

        total = time.perf_counter() - started
        return Result(
            layers=work.records,
            dense=work.dense(),
            seconds={"total": total, "load": loaded, **work.seconds},
            bits_per_weight=work.bits_per_weight,
            bytes=work.bytes,
            record=work.record(calibration),
            output=None if self.output is None else Path(self.output),
            _model=None if self.output is not None else model,
            _write=save,
        )

    def _tokens(self, checkpoint: Checkpoint, model: Any) -> Tensor:
        if isinstance(self.calib, Tensor):
            tokens = calibration_tokens(self.calib, None, 1, 1, self.seed)
            sequence_length(model, tokens.shape[1])
        else:
            seqlen, tokenizer = sequence_length(model, self.seqlen), load_tokenizer(checkpoint)
            tokens = calibration_tokens(
                self._calib_name(), tokenizer, self.nsamples, seqlen, self.seed, chat=self.chat
            )
        check_vocabulary(model, tokens)
        return tokens

    def _calib_name(self) -> str:
        return str(self.calib or ("demo" if self.model_config.is_demo else "c4"))

    def _calibration(self, tokens: Tensor) -> dict[str, Any]:
        """What the checkpoint says of its calibration: a file's name, not where it lay."""
        size = {"samples": tokens.shape[0], "seqlen": tokens.shape[1]}
        if isinstance(self.calib, Tensor):
            return {"text": "token ids", **size}
        name = self._calib_name()
        text = Path(name).name if Path(name).is_file() else name
        return {"text": text, **size, "seed": self.seed, "chat": self.chat}
