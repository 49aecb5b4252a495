"""Compare quantizers by what they leave of a model: its perplexity, and its predictions."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from optq import __version__
from optq.config import ModelConfig, load
from optq.contenders import Job, contender
from optq.core.qep import QEP
from optq.data.calibration import calibration_tokens
from optq.data.evaluation import evaluation_tokens
from optq.errors import DataError, ModelError, OutputError
from optq.evaluate.divergence import Divergence, divergence
from optq.evaluate.perplexity import perplexity
from optq.evaluate.speed import model_speed
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.predictions import Predictions, predictions
from optq.model.source import sequence_length
from optq.result import Result

DEMO_SEQLEN = 512  # what the bundled model was trained on
DEMO_SAMPLES = 64
Setting = tuple[str, float, int]  # a method, bits, columns to a group
Update = Callable[[float, float, str], None]  # done, total, note


@dataclass(frozen=True)
class Row:
    """One quantizer on one model; ``method`` is ``none`` for the model as it is.

    ``divergence`` and ``agreement`` are those of :mod:`optq.evaluate.divergence` from the model as
    it is: None of that itself, and of rows that an older OPTQ has kept. Errors are standard errors
    over the windows, the rise's of their paired differences.
    """

    method: str
    wbits: float  # or bits per weight, of a budget
    groupsize: int
    bits_per_weight: float
    bytes: int  # of the layers that are quantized, or would be
    perplexity: float
    rise: float = 0.0  # over the model as it is
    seconds: float = 0.0  # of quantizing
    rise_error: float | None = None
    divergence: float | None = None
    divergence_error: float | None = None
    agreement: float | None = None
    agreement_error: float | None = None
    abits: int | None = None  # of activations, where they are quantized
    sparsity: float | None = None  # of a pruned model: the share of weights that are zero
    tokens_per_second: float | None = None  # one sequence, from packed weights, where measured


@dataclass(frozen=True)
class Comparison:
    """What is compared on what. ``calib`` and ``text`` are SPECs of :mod:`optq.data`.

    ``methods`` are names of :mod:`optq.contenders`; one with bits of its own is one row, whatever
    ``wbits`` and ``groupsizes`` are. ``budgets`` are bits per
    weight within which each layer has a width of its own; ``done`` is called with each row that
    was measured, and what its run gave. Without ``far`` perplexity alone
    is measured, in two thirds of what measuring takes. With ``speed`` each row's tokens per second
    are measured too, from packed weights, in a folder that goes again.
    """

    config: ModelConfig
    methods: Sequence[str]
    wbits: Sequence[int]
    groupsizes: Sequence[int]
    calib: str
    text: str
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    skip: str | None = None
    budgets: Sequence[float] = ()
    done: Callable[[Row, Result], object] = lambda *_: None
    far: bool = True
    speed: bool = False

    def run(self, results: Path | None = None, progress: Update = lambda *_: None) -> list[Row]:
        """All rows, the full-precision model first.

        Each is added to the JSON lines of ``results`` as soon as it is there, and one that is
        there already, of the same model, texts and settings, is not measured again. Raises
        ``SettingError`` before any work for a method, width or group size that cannot be.
        """
        known = {method: contender(method) for method in self.methods}
        wide = [method for method in self.methods if known[method].bits is None]
        settings: list[Setting]
        settings = [(m, w, g) for w in self.wbits for g in self.groupsizes for m in wide]
        settings += [(m, row.bits, -1) for m, row in known.items() if row.bits is not None]
        settings += [("budget", bits, g) for bits in self.budgets for g in self.groupsizes]
        built = {setting: contender(setting[0]).build(*setting[1:]) for setting in settings}
        common = self._key(self.config.plain_checkpoint())
        kept = Rows(results)
        if self.speed:
            common += " timed"
        keys = {s: f"{common} {s} {self._told(s, q)}" for s, q in built.items()}
        model, tokenizer = self.config.load()
        seqlen = sequence_length(model, self.seqlen)

        def reading(done: int, total: int) -> None:
            progress(0, 1, f"reading text: {done} of {total}")

        windows = evaluation_tokens(self.text, tokenizer, seqlen, reading)
        blocks = find_blocks(model, self.skip)
        layers = [layer for block in blocks for layer in block.layers]
        for setting, quantizer in built.items():
            contender(setting[0]).check(quantizer, blocks)
        tokens = None
        if not kept.rows.keys() >= {*keys.values()}:  # one calibration for all
            what = self.calib, tokenizer, self.nsamples, seqlen, self.seed
            tokens = calibration_tokens(*what, progress=reading)
        steps = len(settings) + 1
        progress(0, steps, "full precision")
        size, bits = sum(layer.weight.nbytes for layer in layers), 8 * layers[0].weight.itemsize
        del blocks, layers
        timed = self.speed and common not in kept.rows
        rate = model_speed(model, size).decode if timed else None
        dense: Predictions | None = None
        if self.far and (tokens is not None or common not in kept.rows):
            with suppress(ModelError):  # of a head that cannot be had alone: perplexity, no more
                dense = predictions(model, [windows])[0]
        if common not in kept.rows:
            measured = perplexity(dense or model, windows).perplexity
            full_row = Row("none", bits, -1, bits, size, measured, tokens_per_second=rate)
            kept.add(common, full_row)
        del model
        full = kept.rows[common].perplexity
        for step, (setting, key) in enumerate(keys.items(), start=1):
            method, wbits, groupsize = setting
            progress(step, steps, f"{method} at {wbits} bits, groupsize {groupsize}")
            if key not in kept.rows:
                assert tokens is not None
                how = setting, built[setting], tokens, windows, dense or full
                kept.add(key, self._measure(*how))
        return [kept.rows[common], *(kept.rows[key] for key in keys.values())]

    def _measure(
        self,
        setting: Setting,
        built: Any,
        tokens: Tensor,
        windows: Tensor,
        full: Predictions | float,
    ) -> Row:
        """``full``: what the full-precision model predicts, or its perplexity."""
        start, method = time.perf_counter(), contender(setting[0])
        made = method.make(method, built, Job(self.config, tokens, self.skip, setting[1]))
        seconds = time.perf_counter() - start
        about = *setting, made.bits_per_weight, made.bytes
        if isinstance(full, float):
            own = perplexity(made.model, windows).perplexity
            row = Row(*about, own, own - full, seconds)
        else:
            row = _row(about, divergence(made.model, full, windows), seconds)
        rate = self._rate(made.result) if self.speed and made.result else None
        told = {"abits": method.abits, "sparsity": method.sparsity, "tokens_per_second": rate}
        row = replace(row, **told)  # type: ignore[arg-type]
        if made.result:
            self.done(row, made.result)
        return row

    def _rate(self, result: Result) -> float:
        """Tokens per second of what a run would write."""
        with tempfile.TemporaryDirectory() as folder:
            result.save(Path(folder) / "model")
            model = load(Path(folder) / "model", self.config.device)
            return model_speed(model, result.bytes).decode

    def _told(self, setting: Setting, built: Any) -> str:
        """Of a setting all that decides its row."""
        method = contender(setting[0])
        return f"{built!r} {method.propagates(setting[1]) and QEP()!r} {method.tune}"

    def _key(self, checkpoint: Checkpoint) -> str:
        """Of everything but the setting that a row depends on."""
        here = [] if checkpoint.hub else [*checkpoint.folder.iterdir()]  # the hub's may yet come
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in here]
        if checkpoint.hub:
            files.append((checkpoint.hub.revision, 0, 0))
        for spec in (self.calib, self.text):
            if os.path.isfile(spec):  # which takes a text too long for a name as well
                files.append((spec, Path(spec).stat().st_size, Path(spec).stat().st_mtime_ns))
        numbers = (self.nsamples, self.seqlen, self.seed, self.calib, self.text, self.skip)
        where = (__version__, self.config.torch_device().type, self.config.dtype)
        return hashlib.sha256(repr((sorted(files), numbers, where)).encode()).hexdigest()[:16]


def _row(about: tuple[str, float, int, float, int], found: Divergence, seconds: float) -> Row:
    own, full, error = found.own.perplexity, found.dense.perplexity, found.ratio_error
    return Row(
        *about,
        perplexity=own,
        rise=own - full,
        seconds=seconds,
        rise_error=None if error is None else full * error,
        divergence=found.mean,
        divergence_error=found.mean_error,
        agreement=found.agreement,
        agreement_error=found.agreement_error,
    )


class Rows:
    """The rows in a file of JSON lines, by all that they depend on."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path is None:
            return
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]  # a crash may have cut the last line short
            for line in whole.splitlines():
                entry = json.loads(line)
                key = entry.pop("key")
                self.rows[key] = Row(**entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} holds no results of optq compare", "name another file with --results"
            ) from error
        self._append("", after=len(whole.encode()))

    def add(self, key: str, row: Row) -> None:
        self.rows[key] = row
        self._append(json.dumps({"key": key, **asdict(row)}) + "\n")

    def _append(self, text: str, after: int | None = None) -> None:
        """Write ``text`` at the end, or ``after`` so many bytes, whatever follows them."""
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                if after is not None:
                    file.truncate(after)
                file.write(text)
        except OSError as error:
            raise OutputError.of(self.path, error, "--results") from error


def demo_rows(
    device: str, progress: Update, done: Callable[[Row, Result], object] = lambda *_: None
) -> list[Row]:
    """The bundled model as it is, rounded, and with GPTQ, at 4, 3 and 2 bits."""
    comparison = Comparison(
        ModelConfig("demo", device),
        methods=("rtn", "gptq"),
        wbits=(4, 3, 2),
        groupsizes=(128,),
        calib="demo",
        text="demo",
        nsamples=DEMO_SAMPLES,
        seqlen=DEMO_SEQLEN,
        done=done,
        far=False,  # a first look is to be quick
    )
    return comparison.run(progress=progress)
