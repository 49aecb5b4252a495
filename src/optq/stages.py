"""The stages of a run that take its time: widths are chosen, blocks solved, scales tuned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optq.budget import Mixed
from optq.distill import tuned
from optq.errors import SettingError
from optq.formats.notices import of_widths
from optq.formats.writer import Writer
from optq.model.activations import Activations
from optq.model.blocks import Block
from optq.model.checkpoint import Checkpoint
from optq.probe import choose, measured
from optq.quantize import Quantization
from optq.record import Choice, DistillRecord
from optq.tune import Tune
from optq.tuning import Tuner

Find = Callable[[Any], list[Block]]  # a model's blocks


def solve_blocks(
    work: Quantization,
    checkpoint: Checkpoint,
    tokens: Tensor,
    held: Activations,
    tune: Tune,
    seed: int,
    find: Find,
    notice: Callable[[str], None],
) -> list[Choice] | None:
    """Solve all blocks, each tuned if ``tune`` says so, in the widths that are given back if they
    were chosen, within a budget.
    """
    solving, sink, blocks = work.solving, work.sink, work.blocks
    quantizer, ranks, choices, tuner = solving.quantizer, work.ranks, None, None
    many = f"{tokens.shape[0]} x {tokens.shape[1]} tokens"
    fewer = "choose fewer --nsamples, a shorter --seqlen, or --device cpu"
    with _memory_for(many, held.device, fewer):
        if isinstance(quantizer, Mixed):
            start, journal = time.perf_counter(), sink.journal if isinstance(sink, Writer) else None
            probed = quantizer, checkpoint, find, sink.form, tokens, held, work.progress, ranks
            choices = choose(blocks, journal, ranks, lambda: measured(*probed))
            work.seconds["choose"] = time.perf_counter() - start
            banks = [bank for block in blocks for bank in block.banks]
            for line in of_widths(sink.form, banks) if ranks.first else ():
                notice(line)
        if tune.blocks is not None and sink.finished() < len(blocks):
            start = time.perf_counter()

            def without_head(model: Any) -> list[Block]:
                return [block for block in find(model) if not block.head]

            where = checkpoint, without_head, tokens, held.device
            tuner = Tuner.of(tune.blocks, solving.storage, seed, *where)
            work.seconds["tune"] = time.perf_counter() - start
        work.calibrate(tokens, held, tuner)
    return choices


def tune_scales(
    work: Quantization,
    checkpoint: Checkpoint,
    tokens: Tensor,
    device: torch.device,
    tune: Tune,
    seed: int,
    find: Find,
    progress: Callable[[int, int, float], None],
) -> tuple[Any, DistillRecord]:
    """The model with its scales tuned, as :func:`optq.distill.tuned` gives it."""
    assert tune.model is not None
    start, how = time.perf_counter(), (work.solving.storage, tune.model, seed, progress)
    instead = "--tune blocks goes on from here, and leaves the scales of all as they are"
    with _memory_for("the whole model", device, instead):
        made = tuned(checkpoint, find, work.names, work.sink, device, tokens, *how)
    work.seconds["scales"] = time.perf_counter() - start
    return made


@contextmanager
def _memory_for(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SettingError(f"{device} has too little memory for {what}", remedy) from error
