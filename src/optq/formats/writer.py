"""Write a quantized checkpoint block by block, and let it appear only when it is whole.

All goes to a hidden folder beside the target (:mod:`optq.formats.whole`): shards as the run goes,
each read back and compared bit for bit; then the tensors that stay as they are, the config and the
companions of the source. With a journal (:mod:`optq.formats.journal`) each block is a file of its
own as soon as it is done. A checkpoint that fits in one file is one all the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optq.core.weight import LayerScheme, QuantizedWeight
from optq.errors import NumericsError
from optq.formats.journal import Done, Journal
from optq.formats.scheme import Format, Solved
from optq.formats.shard import save
from optq.formats.whole import Whole, writing
from optq.model.checkpoint import Checkpoint
from optq.model.dense import LeftOver
from optq.record import FILE, TIMES, Found, RunRecord, Times

SHARD_BYTES = 2**29  # at most, but for a tensor that has more
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Layers by name on disk, and other tensors.
Restored = tuple[Iterator[tuple[str, QuantizedWeight]], dict[str, Tensor]]


class Kept:
    """Encoded layers, kept in memory for a :class:`Writer` to come; ``dtype`` is the model's."""

    def __init__(self, form: Format, dtype: torch.dtype) -> None:
        self.form, self.dtype = form, dtype
        self.layers: dict[str, LayerScheme] = {}  # by name on disk
        self.plain: set[str] = set()  # names of tensors that are no layer's, and new
        self.found: list[Found] = []
        self.bytes = self.weights = 0  # as encoded, and how many weights that is
        self.blocks: list[dict[str, Tensor]] = []

    def commit(
        self, layers: Solved, found: Found | None = None, plain: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the solved layers of one block, by name on disk.

        ``plain`` are tensors that are no layer's and have changed: norms that were smoothed.
        """
        tensors = self._encode(layers)
        beside = {name: tensor.cpu() for name, tensor in (plain or {}).items()}
        done = Done(
            tensors=[*tensors, *beside],
            layers={name: scheme for name, (_, scheme) in layers.items()},
            found=found,
            bytes=sum(tensor.nbytes for tensor in tensors.values()),
            weights=sum(weight.codes.numel() for weight, _ in layers.values()),
            plain=[*beside],
        )
        self._take_block(tensors | beside, done)
        self._count(done)

    def finished(self) -> int:
        """How many blocks an earlier run has finished."""
        return 0

    def restored(self) -> Restored | None:
        """The layers of the next block, by name on disk, if an earlier run has finished it.

        And the tensors that have changed beside them.
        """
        return None

    def solved(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """All layers, by name on disk, as they were encoded."""
        for tensors in self._encoded():
            yield from self._decode(tensors)

    def rescale(self, scales: Mapping[str, Tensor]) -> None:
        """Encode all layers anew, each with its ``scales [rows, groups]``."""
        self._take_anew(
            self._encode({n: (replace(w, scales=scales[n]), self.layers[n]) for n, w in found})
            for found in map(self._decode, self._encoded())
        )

    def _encode(self, layers: Solved) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, (weight, scheme) in layers.items():
            encoded = self.form.encode(weight, self.dtype, scheme.sym)
            for suffix, tensor in encoded.items():
                tensors[f"{name}.{suffix}"] = tensor.T.contiguous() if scheme.conv1d else tensor
        return tensors

    def _decode(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, QuantizedWeight]]:
        for name in dict.fromkeys(part.rpartition(".")[0] for part in tensors):
            if name not in self.layers:  # of a norm
                continue
            parts = [suffix for suffix in self.form.parts if f"{name}.{suffix}" in tensors]
            own = {suffix: tensors[f"{name}.{suffix}"] for suffix in parts}
            yield name, _decoded(self.form, name, own, self.layers[name])

    def _encoded(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each block."""
        return iter(self.blocks)

    def _take_anew(self, blocks: Iterator[dict[str, Tensor]]) -> None:
        self.blocks = list(blocks)

    def _count(self, done: Done) -> None:
        self.layers |= done.layers
        self.plain |= {*done.plain}
        self.found += [done.found] if done.found else []
        self.bytes += done.bytes
        self.weights += done.weights

    def _take_block(self, tensors: dict[str, Tensor], done: Done) -> None:
        self.blocks.append(tensors)


class Dropped(Kept):
    """What a process has that neither writes nor keeps: another one does."""

    def commit(
        self, layers: Solved, found: Found | None = None, plain: Mapping[str, Tensor] | None = None
    ) -> None:
        pass


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

    def restored(self) -> Restored | None:
        from safetensors import safe_open

        index, done = next(self._earlier, (0, None))
        if done is None:
            return None
        plain: dict[str, Tensor] = {}
        if done.plain:
            assert self.journal is not None
            with safe_open(self.journal.file(index), "pt") as file:
                plain = {name: file.get_tensor(name) for name in done.plain}
        return self._layers_of(index, done), plain

    def _layers_of(self, index: int, done: Done) -> Iterator[tuple[str, QuantizedWeight]]:
        from safetensors import safe_open

        assert self.journal is not None
        if not done.tensors:
            return
        with safe_open(self.journal.file(index), "pt") as file:
            for name, scheme in done.layers.items():
                parts = [s for s in self.form.parts if f"{name}.{s}" in done.tensors]
                tensors = {suffix: file.get_tensor(f"{name}.{suffix}") for suffix in parts}
                yield name, _decoded(self.form, name, tensors, scheme)

    def take(self, kept: Kept) -> None:
        """Take all that a run has kept, in the place of commits."""
        self.layers, self.plain = kept.layers, kept.plain
        for tensors in kept.blocks:
            self._take(tensors)

    def finish(
        self,
        rest: LeftOver,
        percdamp: float = 0.0,
        record: RunRecord | None = None,
        times: Callable[[], Times] | None = None,
    ) -> None:
        """Add all that is not quantized, and let the checkpoint appear."""
        packed = (f"{name}.weight" for name in self.layers)
        replaced = {*rest.replaced, *self.plain, *packed}
        names = [name for name in self.source.files if name not in replaced]
        size = self._total + sum(self.source.layout[name].nbytes for name in names)
        size += sum(tensor.nbytes for tensor in self._pending.values())
        if self.journal is not None and size <= SHARD_BYTES:
            self._take_back()
        for name, tensor in self.source.tensors(names):
            if tensor.dtype in FLOATS and not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{name} holds NaN or infinity", "copy the model again, or train it again"
                )
            self._take({name: tensor})
        self._flush()
        with writing(self.target):
            settings = self.form.config(self.layers, rest.inside, percdamp, rest.outside)
            config = self.source.config()
            if settings:  # what is pruned only is a plain model
                config |= {"quantization_config": settings}
            for file, content in {"config.json": config, self.form.settings_file: settings}.items():
                if file is not None:
                    self._write_json(file, content)
            if record is not None:
                (self.folder / FILE).write_text(record.text(), encoding="utf-8")
            if times is not None:
                self._write_json(TIMES, times().model_dump())
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

    def _encoded(self) -> Iterator[dict[str, Tensor]]:
        from safetensors.torch import load_file

        assert self.journal is not None
        for index, done in enumerate(self.journal.done):
            if done.tensors:
                yield load_file(self.journal.file(index))

    def _take_anew(self, blocks: Iterator[dict[str, Tensor]]) -> None:
        """Into files beside those of the journal, from which a run that is cut off goes on."""
        self._shards, self._total = [], 0
        for tensors in blocks:
            self._take(tensors)

    def _add_block(self, index: int, done: Done) -> None:
        assert self.journal is not None
        if done.tensors:
            self._shards.append((self.journal.file(index), done.tensors))
            beside = sum(self.source.layout[name].nbytes for name in done.plain)
            self._total += done.bytes + beside

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


def _decoded(
    form: Format, name: str, tensors: dict[str, Tensor], scheme: LayerScheme
) -> QuantizedWeight:
    """A layer of the file; of a ``Conv1D`` that has no codes, the other way round."""
    turned = {s: tensor.T.contiguous() for s, tensor in tensors.items()} if scheme.conv1d else {}
    return form.decode(name, tensors | turned, scheme)
