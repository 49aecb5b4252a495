"""What a finished run gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from optq.formats import reader
from optq.model.checkpoint import Checkpoint
from optq.record import Choice, LayerRecord, RunRecord


@dataclass
class Result:
    """A finished run: ``layers`` are its records, ``seconds`` where its time went."""

    layers: list[LayerRecord]
    dense: list[str]  # linear layers inside the blocks that stay as they were
    seconds: dict[str, float]
    bits_per_weight: float  # of the quantized layers, scales and all
    bytes: int  # of the quantized layers in the file
    choices: list[Choice] | None  # of widths, where there was a budget
    record: RunRecord  # what goes into the checkpoint's optq.json
    output: Path | None
    activations: dict[str, int]  # the most bytes that batches held: memory, host, files
    sent: dict[tuple[str, str], int]  # bytes, by site and kind, to other processes of the run
    _model: Any
    _write: Callable[[Path, bool], None]

    @cached_property
    def model(self) -> Any:
        """The quantized model, on the CPU: packed where the run wrote it, else dequantized."""
        return self._model or reader.load_checkpoint(Checkpoint.open(str(self.output)))

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the checkpoint to the folder ``path``; for a run without ``output``."""
        self._write(Path(path), force)
