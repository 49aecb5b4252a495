"""Write a quantized checkpoint block by block, and let it appear only when it is whole.

All goes to a hidden folder beside the target (:mod:`optq.formats.whole`): shards as the run goes,
each read back and compared bit for bit; then the tensors that stay as they are, the config and the
companions of the source. With a journal (:mod:`optq.formats.journal`) each block is a file of its
own as soon as it is done. A checkpoint that fits in one file is one all the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optq.core.weight import LayerScheme, QuantizedWeight
from optq.errors import NumericsError, OutputError
from optq.formats.journal import Done, Journal
from optq.formats.scheme import Format, Solved
from optq.formats.shard import save
from optq.formats.whole import Whole, writing
from optq.model.checkpoint import Checkpoint
from optq.record import FILE, LayerRecord, RunRecord

SHARD_BYTES = 2**29  # at most, but for a tensor that has more
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Kept:
    """Encoded layers, kept in memory for a :class:`Writer` to come; ``dtype`` is the model's."""

    def __init__(self, form: Format, dtype: torch.dtype) -> None:
        self.form, self.dtype = form, dtype
        self.layers: dict[str, LayerScheme] = {}  # by name on disk
        self.records: list[LayerRecord] = []
        self.bytes = self.weights = 0  # as encoded, and how many weights that is
        self.blocks: list[dict[str, Tensor]] = []

    def commit(self, layers: Solved, records: Sequence[LayerRecord]) -> None:
        """Take the solved layers of one block, by name on disk."""
        tensors: dict[str, Tensor] = {}
        for name, (weight, scheme) in layers.items():
            encoded = self.form.encode(weight, self.dtype, scheme.sym)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()}
        done = Done(
            tensors=list(tensors),
            layers={name: scheme for name, (_, scheme) in layers.items()},
            records=list(records),
            bytes=sum(tensor.nbytes for tensor in tensors.values()),
            weights=sum(weight.codes.numel() for weight, _ in layers.values()),
        )
        self._take_block(tensors, done)
        self._count(done)

    def finished(self) -> int:
        """How many blocks an earlier run has finished."""
        return 0

    def restored(self) -> Iterator[tuple[str, QuantizedWeight]] | None:
        """The layers of the next block, by name on disk, if an earlier run has finished it."""
        return None

    def _count(self, done: Done) -> None:
        self.layers |= done.layers
        self.records += done.records
        self.bytes += done.bytes
        self.weights += done.weights

    def _take_block(self, tensors: dict[str, Tensor], done: Done) -> None:
        self.blocks.append(tensors)


class Writer(Kept):
    """A checkpoint under way in ``place``, of the plain or quantized model ``source``.

    What its ``journal`` has of an earlier run is in it from the start.
    """

    def __init__(
        self,
        place: Whole,
        source: Checkpoint,
        form: Format,
        dtype: torch.dtype,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(form, dtype)
        self.place, self.source, self.journal = place, source, journal
        self.target, self.folder = place.target, place.part
        with writing(self.target):
            self.folder.mkdir(exist_ok=journal is not None)
        self._pending: dict[str, Tensor] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0
        earlier = journal.done if journal else []
        self._earlier = iter([*enumerate(earlier)])
        for index, done in enumerate(earlier):
            self._count(done)
            self._add_block(index, done)

    def finished(self) -> int:
        return len(self.journal.done) if self.journal else 0

    def restored(self) -> Iterator[tuple[str, QuantizedWeight]] | None:
        index, done = next(self._earlier, (0, None))
        return None if done is None else self._layers_of(index, done)

    def _layers_of(self, index: int, done: Done) -> Iterator[tuple[str, QuantizedWeight]]:
        from safetensors import safe_open

        assert self.journal is not None
        if not done.tensors:
            return
        with safe_open(self.journal.file(index), "pt") as file:
            for name, scheme in done.layers.items():
                parts = [s for s in self.form.parts if f"{name}.{s}" in done.tensors]
                tensors = {suffix: file.get_tensor(f"{name}.{suffix}") for suffix in parts}
                yield name, self.form.decode(name, tensors, scheme)

    def take(self, kept: Kept) -> None:
        """Take all that a run has kept, in the place of commits."""
        self.layers = kept.layers
        for tensors in kept.blocks:
            self._take(tensors)

    def finish(
        self,
        dense: list[str],
        percdamp: float = 0.0,
        record: RunRecord | None = None,
        outside: Sequence[str] = (),
        packed: Collection[str] = (),
    ) -> None:
        """Add all that is not quantized, and let the checkpoint appear.

        ``dense`` and ``outside`` are the linear layers that stay as they are, inside the blocks
        and elsewhere; ``packed`` the tensors of a quantized source that :meth:`commit` replaced.
        """
        replaced = {*packed, *(f"{name}.weight" for name in self.layers)}
        rest = [name for name in self.source.files if name not in replaced]
        size = self._total + sum(self.source.layout[name].nbytes for name in rest)
        if self.journal is not None and size <= SHARD_BYTES:
            self._take_back()
        for name, tensor in self.source.tensors(rest):
            if tensor.dtype in FLOATS and not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{name} holds NaN or infinity", "copy the model again, or train it again"
                )
            self._take({name: tensor})
        self._flush()
        with writing(self.target):
            settings = self.form.config(self.layers, dense, percdamp, outside)
            config = self.source.config() | {"quantization_config": settings}
            for file, content in {"config.json": config, self.form.settings_file: settings}.items():
                if file is not None:
                    self._write_json(file, content)
            if record is not None:
                (self.folder / FILE).write_text(record.text(), encoding="utf-8")
            for path in self.source.companions():
                if path.is_dir():
                    shutil.copytree(path, self.folder / path.name)
                elif not (self.folder / path.name).exists():
                    shutil.copy(path, self.folder / path.name)
            self._name_shards()
        self.place.appear()

    def _take_block(self, tensors: dict[str, Tensor], done: Done) -> None:
        if self.journal is None:
            self._take(tensors)
            return
        if tensors:
            save(tensors, self.journal.next_file, self.target)
        self._add_block(len(self.journal.done), done)
        self.journal.add(done)

    def _add_block(self, index: int, done: Done) -> None:
        assert self.journal is not None
        if done.tensors:
            self._shards.append((self.journal.file(index), done.tensors))
            self._total += done.bytes

    def _take(self, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in (*self._pending.values(), *tensors.values()))
        if size > SHARD_BYTES:
            self._flush()
        self._pending |= tensors

    def _take_back(self) -> None:
        """All goes into one file: what has one of its own is read once more."""
        from safetensors.torch import load_file

        for path, _ in self._shards:
            self._pending |= load_file(path)
        self._shards, self._total = [], 0

    def _flush(self) -> None:
        if self._pending:
            path = self.folder / f"shard-{len(self._shards)}.safetensors"
            save(self._pending, path, self.target)
            self._total += sum(tensor.nbytes for tensor in self._pending.values())
            self._shards.append((path, list(self._pending)))
            self._pending.clear()

    def _name_shards(self) -> None:
        """Blocks come first: where a run is cut off among them, :class:`Journal` finds them."""
        count = len(self._shards)
        files = [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
        if count == 1:
            files = ["model.safetensors"]
        else:
            pairs = zip(self._shards, files, strict=True)
            where = {name: file for (_, names), file in pairs for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": where}
            self._write_json("model.safetensors.index.json", index)
        for (path, _), file in zip(self._shards, files, strict=True):
            path.rename(self.folder / file)

    def _write_json(self, file: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        (self.folder / file).write_text(text, encoding="utf-8")


def place_of(
    target: Path,
    source: Checkpoint,
    force: bool,
    notice: Callable[[str], None] = lambda _: None,
    goes_on: bool = False,
) -> Whole:
    """The place of a checkpoint of ``source``; ``notice`` is told of leftovers.

    Raises :class:`OutputError` for a target that must not be, or cannot be, replaced.
    """
    elsewhere = "choose another folder"
    if "\0" in str(target):
        raise OutputError(f"no folder can be called {str(target)!r}", elsewhere)
    with writing(target):
        model, here, place = source.folder.resolve(), Path.cwd(), target.resolve()
        if place in (model, *model.parents):
            raise OutputError(f"{target} holds the model itself", elsewhere)
        if place in (here, *here.parents):
            raise OutputError(f"{target} holds the current folder", elsewhere)
        if target.is_symlink() and not target.exists():
            raise OutputError(f"{target} is a link to nowhere", elsewhere)
        if os.path.ismount(target):  # the volume of a container, say
            raise OutputError(
                f"{target} is a mount point", f"give a folder inside, such as {target / 'model'}"
            )
        empty = target.is_dir() and not any(target.iterdir())
        if target.exists() and not empty and not (target / "config.json").exists():
            raise OutputError(
                f"{target} exists and holds no checkpoint", f"move it away, or {elsewhere}"
            )
        if target.is_dir() and not os.access(target, os.W_OK):  # it could not be moved at the end
            raise OutputError(f"{target} is read-only", f"make it writable, or {elsewhere}")
    return Whole(target, force, notice, goes_on)
