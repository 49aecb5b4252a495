"""Quantize a model: the whole story on one page.

    Runner(ModelConfig(model_id="folder"), GPTQ(wbits=4, groupsize=128), output="out").run()

Open the checkpoint, read calibration tokens, and let :mod:`optq.model.flow` take the model
through its own forward. At each site the stacked weights of its layers meet the Hessian of their
common input, the quantizer turns both into codes, and the dequantized weights go back into the
model, so that everything behind them sees the error made so far. Codes go to disk block by block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from optq import __version__
from optq.budget import Mixed, told
from optq.config import ModelConfig, check_types
from optq.core.pruning import Pruner
from optq.core.qep import QEP
from optq.core.solver import Solver
from optq.data.calibration import tokens_for
from optq.data.given import described, given
from optq.data.text import Text
from optq.errors import NumericsError, SettingError
from optq.formats import form_of
from optq.formats.journal import Journal, settings
from optq.formats.notices import notices
from optq.formats.place import place_of
from optq.formats.scheme import Format
from optq.formats.whole import Whole
from optq.formats.writer import Dropped, Kept, Writer
from optq.model.activations import Activations
from optq.model.blocks import Block, find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.dense import left_over
from optq.model.head import with_own_head
from optq.model.shards import open_model
from optq.plan import Plan, Skeleton, calibration_size, make_plan
from optq.quantize import Progress, Quantization, names_on_disk, record_of
from optq.ranks import Ranks, together
from optq.record import Times, unsmoothed, without_tokens
from optq.result import Result
from optq.stages import solve_blocks, tune_scales
from optq.tune import Tune


@dataclass
class Runner:
    """One quantization run.

    ``calib`` is a SPEC of :mod:`optq.data` (default: ``c4``, and ``demo`` for the bundled model),
    token ids ``[samples, tokens]``, or what :func:`optq.data.given.given` takes; ``output`` a
    folder to write as the run goes (without it the result keeps everything and can ``save``);
    ``seqlen`` defaults to 2048, or to the model's positions if those are fewer; ``skip`` is a
    regular expression of layers to leave dense; ``chat`` passes the text through the tokenizer's
    chat template; ``restart`` throws away what a run that was cut off has left, from which the same
    settings would go on; ``qep`` is True or a :class:`QEP` (off unless asked for, where the
    command's default below 8 bits is True); ``activation_memory`` is how many bytes batches may
    hold on the device (default: half of what is free): the rest goes to host memory, then to files;
    ``tune`` is "blocks", "model" or a :class:`Tune`; ``progress`` is called after each site, and
    each block that is tuned, ``tuning(step, steps, divergence)`` as :func:`optq.distill.distill`
    says, ``reading(done, total)`` with the windows drawn from ``c4``, ``notice`` with what a person
    should know; ``head`` quantizes the output head too, to so many bits, 8 or 4, and ``untie``
    parts it from embeddings that are the head; ``format`` is gptq, or compressed-tensors where
    activations are quantized (:class:`optq.core.smoothquant.SmoothQuant`), unless another is named.
    """

    model_config: ModelConfig
    quantizer: Solver | Mixed
    qep: bool | QEP | None = False
    calib: str | Path | Tensor | Iterable[Any] | None = None
    output: str | Path | None = None
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    format: str | None = None
    skip: str | None = None
    chat: bool = False
    force: bool = False
    restart: bool = False
    activation_memory: int | None = None
    progress: Callable[[Progress], None] = lambda _: None
    notice: Callable[[str], None] = lambda _: None
    reading: Callable[[int, int], None] | None = None
    tune: Tune | str | None = None
    tuning: Callable[[int, int, float], None] = lambda *_: None
    head: int | None = None
    untie: bool = False

    def run(self) -> Result:
        """Quantize. Raises an :class:`optq.errors.OptqError` for all that a user can put right."""
        started = time.perf_counter()
        form, checkpoint = self._form(), self._checkpoint()
        with together(self.model_config.torch_device()) as ranks:
            if self.output is None or not ranks.first:
                return self._run(checkpoint, form, None, started, ranks)
            target = Path(self.output)
            with place_of(target, checkpoint, self.force, self.notice, True) as place:
                try:
                    return self._run(checkpoint, form, place, started, ranks)
                except NumericsError:
                    place.keep = False  # the same command would find it again
                    raise

    def plan(self, skeleton: Skeleton | None = None) -> Plan:
        """What :meth:`run` would do, of headers and shapes alone. Raises what it would refuse.

        But for the disk: that is for :meth:`optq.plan.Plan.check`, when the plan has been told.
        ``skeleton``: of the same model and ``skip``, if somebody has it.
        """
        form = self._form()
        if skeleton is None:
            skeleton = Skeleton.of(self._checkpoint(whole=False), self.skip, self.head)
        if self.output is not None:
            place_of(Path(self.output), skeleton.checkpoint, self.force).check()
        what = self._calib(), skeleton.model, self.nsamples, self.seqlen
        return self._plan(skeleton, form, calibration_size(*what))

    def _plan(
        self, skeleton: Skeleton, form: Format, size: tuple[int, int], timed: bool = True
    ) -> Plan:
        device, output = self.model_config.torch_device(), self.output and Path(self.output)
        tune = self._tune
        tune.check(size[0])
        streams = 2 if self.qep or tune.blocks else 1
        what = skeleton, form, self.quantizer, streams, *size
        return make_plan(*what, device, output or None, self.activation_memory, timed, tune)

    def _checkpoint(self, whole: bool = True) -> Checkpoint:
        return with_own_head(self.model_config.plain_checkpoint(whole), self.head, self.untie)

    def _form(self) -> Format:
        """The format, with all settings checked."""
        check_types(self, get_type_hints(type(self)))
        if self.head is not None and isinstance(self.quantizer, Pruner):
            raise SettingError("the head is not pruned", "leave out --head")
        if self.head is not None and isinstance(self.quantizer, Mixed):
            cause = f"the widths within {self.quantizer.flag} are those of the blocks' layers"
            raise SettingError(cause, "leave out --head")
        layer = self.quantizer.scheme()
        if layer.abits is not None:
            self._check_activations()
        return form_of(self.format, layer)

    def _check_activations(self) -> None:
        """Refuse what was never tried with activations that are quantized."""
        flags = {"--qep": self.qep, "--tune": self.tune, "--head": self.head}
        if given := [flag for flag, value in flags.items() if value]:
            raise SettingError(
                f"{given[0]} is for weights alone, and activations are to be quantized too",
                f"leave out {given[0]}, or --abits",
            )

    def _run(
        self,
        checkpoint: Checkpoint,
        form: Format,
        place: Whole | None,
        started: float,
        ranks: Ranks,
    ) -> Result:
        device, quantizer, calib = self.model_config.torch_device(), self.quantizer, self._calib()
        model, blocks, shards = open_model(checkpoint, self._blocks)
        names = names_on_disk(model, blocks, checkpoint, quantizer, form)
        if ranks.first:
            self._foretell(checkpoint, form, model, blocks, names)
        how = self.nsamples, self.seqlen, self.seed, self.chat, self.reading
        tokens = ranks.share(lambda: tokens_for(model, checkpoint, calib, *how))
        dtype, storage, tune = model.dtype, form.storage(model.dtype), self._tune
        qep = QEP() if self.qep is True else self.qep or None
        sink: Kept
        if place is None:
            sink = Kept(form, dtype) if ranks.first else Dropped(form, dtype)
        else:
            what = self._settings(checkpoint, device, qep, tokens, calib)
            journal = Journal(place, what, len(blocks), self.restart)
            sink = Writer(place, checkpoint, form, dtype, journal)
        progress: Callable[[Progress], None] = self.progress if ranks.first else lambda _: None
        keep = self.output is None and tune.model is None  # which reads the model once more
        around = (storage, sink, keep, progress, shards, ranks)
        work = Quantization(model, blocks, names, quantizer, qep, *around)
        loaded = time.perf_counter() - started
        beside = None if place is None else place.part.parent
        held = Activations(device, self.activation_memory, beside, ranks.here)
        asked = tune, self.seed, self._blocks
        choices = solve_blocks(work, checkpoint, tokens, held, *asked, self.notice)
        whole, distilled = model, None
        if tune.model is not None:
            whole, distilled = tune_scales(work, checkpoint, tokens, device, *asked, self.tuning)
        record = record_of(
            work,
            sink,
            **told(quantizer),
            qep=None if qep is None else asdict(qep),
            calibration=described(calib, tokens, self.seed, self.chat),
            head=self.head,
            choices=choices,
            tune=asdict(tune) if self.tune else None,
            distilled=distilled,
        )
        for line in (without_tokens(record.layers), unsmoothed(record.sites)):
            if line:
                self.notice(line)
        finishing = time.perf_counter()
        rest = left_over(checkpoint, names, model, blocks, sink.layers)

        def times() -> Times:
            return Times(
                optq=__version__,
                model=self.model_config.model_id,
                calib=calib if isinstance(calib, str) else record.calibration["text"],
                device=str(device),
                threads=torch.get_num_threads(),
                seconds={"total": time.perf_counter() - started, "load": loaded, **work.seconds},
                layers={layer.name: layer.seconds for layer in record.layers},
            )

        last = rest, quantizer.percdamp, record, times
        if isinstance(sink, Writer):
            sink.finish(*last)
        record = ranks.share(lambda: record)
        work.seconds["write"] += time.perf_counter() - finishing

        def save(path: Path, force: bool) -> None:
            if not ranks.first:
                return  # the first process writes
            if place is not None:
                raise SettingError(f"the run wrote {self.output} already", "copy that folder")
            with place_of(path, checkpoint, force, self.notice) as other:
                writer = Writer(other, checkpoint, form, dtype)
                writer.take(sink)
                writer.finish(*last)

        return Result(
            layers=record.layers,
            dense=record.dense,
            seconds=times().seconds,
            bits_per_weight=record.bits_per_weight,
            bytes=record.bytes,
            choices=record.choices,
            record=record,
            output=None if self.output is None else Path(self.output),
            activations=held.most,
            sent=dict(ranks.sent),
            _model=whole if self.output is None else None,
            _write=save,
        )

    def _foretell(
        self,
        checkpoint: Checkpoint,
        form: Format,
        model: Any,
        blocks: list[Block],
        names: dict[str, str],
    ) -> None:
        """Say what a person should know before the work, and refuse what will not fit."""
        banks = [bank for block in blocks for bank in block.banks]
        skipped = [bank for block in blocks for bank in block.dense]
        packed = self.quantizer.scheme(), model, banks, skipped, names, self.head is not None
        size = calibration_size(self._calib(), model, self.nsamples, self.seqlen)
        plan = self._plan(Skeleton.of(checkpoint, self.skip, self.head), form, size, False)
        for line in notices(form, *packed):
            self.notice(line)
        plan.check(self.output)
        for line in plan.warnings():
            self.notice(line)

    def _blocks(self, model: Any) -> list[Block]:
        return find_blocks(model, self.skip, self.head)

    @property
    def _tune(self) -> Tune:
        return Tune.of(self.tune, self.quantizer)

    def _settings(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        qep: QEP | None,
        tokens: Tensor,
        calib: str | Text | Tensor,
    ) -> dict[str, Any]:
        """What another run must have in common with this one to go on from it."""
        tune = self._tune.blocks
        return settings(
            checkpoint,
            device,
            tokens,
            **told(self.quantizer),
            qep=None if qep is None else asdict(qep),
            # The scales come after the blocks, which are the same whatever becomes of them.
            tune=tune and asdict(tune) | {"seed": self.seed},
            format=self._form().name,
            skip=self.skip,
            head=self.head,
            dtype=self.model_config.dtype,
            calibration=described(calib, tokens, self.seed, self.chat),
        )

    def _calib(self) -> str | Text | Tensor:
        if isinstance(self.calib, str | Path | None):
            default = "demo" if self.model_config.is_demo else "c4"
            return default if self.calib is None else str(self.calib)
        return given(self.calib, self.chat)
