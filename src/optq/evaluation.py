"""Evaluate models, one after another: on texts, beside a dense model, in tasks.

The dense model goes first and alone: what its head reads of all texts is kept, and the model let go
(:mod:`optq.model.predictions`), so at most one model is in memory at a time. Where the dense one
does not fit, it passes block by block; it then writes no completions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from optq import __version__
from optq.config import ModelConfig
from optq.data.evaluation import evaluation_tokens
from optq.errors import ModelError, SettingError
from optq.evaluate.completions import PROMPTS, Continued, beside, continued
from optq.evaluate.divergence import Divergence, divergence
from optq.evaluate.perplexity import Perplexity, perplexity
from optq.evaluate.tasks import ZeroShot
from optq.findings import FILE, Against, Findings, OnText
from optq.formats import detect, reader
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.memory import free
from optq.model.predictions import Predictions, predictions, streamed
from optq.model.source import check_vocabulary, empty_model, load_tokenizer, sequence_length
from optq.record import FILE as RECORD

WITH_ROOM = 1.1  # of a model's bytes, for what it computes
Update = Callable[[float, float, str], None]  # done, of how much, a note


@dataclass(frozen=True)
class Evaluated:
    """One model: what was found now. ``made``: it was quantized or pruned."""

    model: str
    made: bool
    findings: Findings


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on what: ``texts`` are SPECs of :mod:`optq.data`, perhaps none.

    Raises ``SettingError`` for a model that is named twice.
    """

    models: Sequence[ModelConfig]
    texts: Sequence[str]
    against: ModelConfig | None = None
    seqlen: int | None = None
    shots: ZeroShot | None = None
    progress: Update = lambda *_: None
    notice: Callable[[str], None] = lambda _: None
    _windows: dict[tuple[str, str, int], Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        names = [config.model_id for config in self.models]
        places = [Path(name).resolve() if Path(name).is_dir() else name for name in names]
        for name, place in zip(names, places, strict=True):
            if places.count(place) > 1:
                raise SettingError(f"{name} is named twice", "name each model once")

    def run(self) -> list[Evaluated]:
        """Each model's findings, in order; added to those beside one that OPTQ or another
        tool has made, in a folder.

        A folder that cannot be written to is named to ``notice``, no more. Raises
        :class:`ModelError` before any work for models that are damaged, those beside which an
        earlier evaluation is, and those whose tokens are not those of the dense one.
        """
        opened = [_Opened.of(config) for config in self.models]
        dense: _Dense | None = None
        if self.against is not None:
            reference = _Opened.of(self.against)
            for each in opened:
                if each.tokens != reference.tokens:
                    raise ModelError(
                        f"{each.name} and {reference.name} have different tokens, so their"
                        " predictions cannot be compared",
                        f"give --against the model that {each.name} was made from",
                    )
            dense = self._dense(reference)
        return [self._evaluated(each, dense) for each in opened]

    def _dense(self, opened: _Opened) -> _Dense:
        """What the full-precision model predicts and writes."""
        name, device = opened.name, opened.config.torch_device()
        size = sum(tensor.nbytes for tensor in opened.checkpoint.layout.values())
        if opened.quantized or WITH_ROOM * size <= free(device):
            model = reader.load_checkpoint(opened.checkpoint, device)
            seqlen = sequence_length(model, self.seqlen)
            every = [self._read(text, opened, model, seqlen) for text in self.texts]
            written = continued(model, opened.tokenizer)
            note = f"{name}: {sum(map(len, every))} windows of {seqlen} tokens"
            kept = predictions(model, every, lambda n, of: self.progress(n, of, note))
            return _Dense(name, seqlen, kept, written)
        skeleton = empty_model(opened.checkpoint)
        seqlen = sequence_length(skeleton, self.seqlen)
        every = [self._read(text, opened, skeleton, seqlen) for text in self.texts]
        self.notice(f"{name} does not fit into memory: it passes block by block")
        note = f"{name}: blocks, for {sum(map(len, every))} windows of {seqlen} tokens"
        where = opened.checkpoint, find_blocks, every, device
        kept = streamed(*where, lambda n, of: self.progress(n, of, note))
        return _Dense(name, seqlen, kept, None)

    def _evaluated(self, opened: _Opened, dense: _Dense | None) -> Evaluated:
        model = reader.load_checkpoint(opened.checkpoint, opened.config.torch_device())
        texts, completions = [], []
        seqlen = sequence_length(model, dense.seqlen if dense else self.seqlen)
        for index, text in enumerate(self.texts):
            windows = self._read(text, opened, model, seqlen)
            note = f"{opened.name}: {text}, {len(windows)} windows of {seqlen} tokens"

            def progress(n: int, of: int, note: str = note) -> None:
                self.progress(n, of, note)

            if dense is None:
                texts.append(_on_text(text, seqlen, perplexity(model, windows, progress=progress)))
            else:
                kept = dense.kept[index]
                found = divergence(model, kept, windows, progress=progress)
                told = _against(dense.name, found)
                texts.append(_on_text(text, seqlen, found.own, told))
        if self.texts and (opened.quantized or dense is not None):
            self.progress(0, 1, f"{opened.name}: completions")
            own = continued(model, opened.tokenizer)
            completions = beside(own, dense.written if dense else None)
        findings = Findings(
            optq=__version__,
            model=opened.checkpoint.folder.resolve().name,
            texts=texts,
            completions=completions,
        )
        if texts:
            self._keep(opened, findings)  # also where a task fails, hours later
        if self.shots:
            tasks = self.shots.run(model, opened.tokenizer)
            findings = findings.model_copy(update={"tasks": tasks})
            self._keep(opened, findings)
        return Evaluated(opened.name, opened.made, findings)

    def _read(self, text: str, opened: _Opened, model: Any, seqlen: int) -> Tensor:
        """The windows of a text, made once for all models of the same tokens."""
        key = text, opened.tokens, seqlen
        if key not in self._windows:
            self._windows[key] = evaluation_tokens(
                text,
                opened.tokenizer,
                seqlen,
                lambda n, of: self.progress(0, 1, f"reading text: {n} of {of}"),
            )
        check_vocabulary(model, self._windows[key])
        return self._windows[key]

    def _keep(self, opened: _Opened, findings: Findings) -> None:
        """Beside the checkpoint, with names of files and folders instead of where they lie."""
        if not opened.keeps:
            return
        if self.shots is not None and self.shots.limit is not None:  # no scores of the task
            some = {f"{n}, first {self.shots.limit}": each for n, each in findings.tasks.items()}
            findings = findings.model_copy(update={"tasks": some})
        folder, path = opened.checkpoint.folder, opened.checkpoint.folder / FILE
        texts = [_by_name(each) for each in findings.texts]
        findings = findings.model_copy(update={"texts": texts})
        try:
            # Read anew: another evaluation may have ended meanwhile.
            known = Findings.read(path).with_later(findings) if path.exists() else findings
            known.write(folder)
        except OSError as error:
            why = error.strerror or error
            self.notice(f"{FILE} is not kept, {folder} cannot be written to: {why}")


@dataclass(frozen=True)
class _Opened:
    """A model before it is loaded. ``tokens`` tells tokenizers apart.

    ``made``: it was quantized or pruned; ``keeps``: and findings belong beside it.
    """

    config: ModelConfig
    checkpoint: Checkpoint
    quantized: bool
    made: bool
    tokenizer: Any
    tokens: str
    keeps: bool

    @property
    def name(self) -> str:
        return self.config.model_id

    @classmethod
    def of(cls, config: ModelConfig) -> _Opened:
        config.torch_device()  # is there
        checkpoint = config.checkpoint()
        quantized, tokenizer = detect(checkpoint) is not None, load_tokenizer(checkpoint)
        folder = checkpoint.folder.resolve()
        # A folder of the hub's own cache is somebody else's, however it was named.
        cached = any(part.startswith("models--") for part in folder.parts)
        made = quantized or (folder / RECORD).is_file()
        keeps = made and not (config.is_demo or checkpoint.hub or cached)
        if keeps and (folder / FILE).exists():
            Findings.read(folder / FILE)  # what is damaged is told of before the work
        return cls(config, checkpoint, quantized, made, tokenizer, _tokens(tokenizer), keeps)


@dataclass(frozen=True)
class _Dense:
    name: str
    seqlen: int
    kept: list[Predictions]  # by text
    written: list[Continued] | None


def _tokens(tokenizer: Any) -> str:
    """The same for tokenizers that give the same ids: by vocabulary, and what they make of text."""
    some = [tokenizer(text)["input_ids"] for text in (*PROMPTS, "Ünïcode \u2014 1,024 \t\r\n  x")]
    told = json.dumps([sorted(tokenizer.get_vocab().items()), some])
    return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()


def _by_name(found: OnText) -> OnText:
    """``optq_eval.json`` travels with the checkpoint, so it holds no path."""
    text = Path(found.text).name if Path(found.text).is_file() else found.text
    against = found.against
    if against is not None and Path(against.dense).is_dir():
        name = Path(against.dense).resolve().name
        against = against.model_copy(update={"dense": name})
    return found.model_copy(update={"text": text, "against": against})


def _on_text(text: str, seqlen: int, own: Perplexity, against: Against | None = None) -> OnText:
    return OnText(
        text=text,
        seqlen=seqlen,
        tokens=own.tokens,
        perplexity=own.perplexity,
        losses=list(own.losses),
        against=against,
    )


def _against(name: str, found: Divergence) -> Against:
    return Against(
        dense=name,
        perplexity=found.dense.perplexity,
        divergence=found.mean,
        divergence_error=found.mean_error,
        divergence_99_9=found.percentile,
        agreement=found.agreement,
        agreement_error=found.agreement_error,
        ratio=found.ratio,
        ratio_error=found.ratio_error,
    )
