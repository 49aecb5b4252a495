"""Write a quantized checkpoint block by block, and let it appear only when it is whole.

All goes to a hidden folder beside the target (:mod:`optq.formats.whole`): shards as the run goes,
each read back and compared bit for bit; then the tensors that stay as they are, the config and the
companions of the source.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from optq.core.weight import LayerScheme
from optq.errors import NumericsError, OutputError
from optq.formats.scheme import Format, Solved
from optq.formats.whole import Whole, writing
from optq.model.checkpoint import Checkpoint
from optq.record import FILE, LayerRecord, RunRecord

SHARD_BYTES = 2**29  # packed weights wait for a full shard in memory
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Dropped:
    """What a process has that neither writes nor keeps: another one does."""

    def commit(self, layers: Solved, records: Sequence[LayerRecord]) -> None: ...


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
            self.layers[name] = scheme
            self.weights += weight.codes.numel()
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        self.records += records
        self._take(tensors)

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.blocks.append(tensors)


class Writer(Kept):
    """A checkpoint under way in ``place``, of the plain or quantized model ``source``."""

    def __init__(self, place: Whole, source: Checkpoint, form: Format, dtype: torch.dtype) -> None:
        super().__init__(form, dtype)
        self.place, self.source = place, source
        self.target, self.folder = place.target, place.part
        with writing(self.target):
            self.folder.mkdir()
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

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
        for name, tensor in self.source.tensors(
            [n for n in self.source.files if n not in replaced]
        ):
            if tensor.dtype in FLOATS and not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{name} holds NaN or infinity", "copy the model again, or train it again"
                )
            self._take({name: tensor})
        self._flush(0)
        with writing(self.target):
            self._name_shards()
            settings = self.form.config(self.layers, dense, percdamp, outside)
            config = self.source.config() | {"quantization_config": settings}
            for file, content in {"config.json": config, self.form.settings_file: settings}.items():
                if file is not None:
                    text = json.dumps(content, indent=2) + "\n"
                    (self.folder / file).write_text(text, encoding="utf-8")
            if record is not None:
                (self.folder / FILE).write_text(record.text(), encoding="utf-8")
            for path in self.source.companions():
                if path.is_dir():
                    shutil.copytree(path, self.folder / path.name)
                elif not (self.folder / path.name).exists():
                    shutil.copy(path, self.folder / path.name)
        self.place.appear()

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self._pending |= tensors
        self._flush(SHARD_BYTES)

    def _flush(self, at_least: int) -> None:
        size = sum(tensor.nbytes for tensor in self._pending.values())
        if not self._pending or size < at_least:
            return
        from safetensors.torch import save_file

        path = self.folder / f"shard-{len(self._shards)}.safetensors"
        with writing(self.target):
            save_file(_unshared(self._pending), path, metadata={"format": "pt"})
            path.chmod(0o644)  # safetensors makes it the owner's alone
        self._compare(path)
        self._total += size
        self._shards.append(list(self._pending))
        self._pending.clear()

    def _compare(self, path: Path) -> None:
        """What is on disk is what was to be written, bit for bit."""
        from safetensors import SafetensorError, safe_open

        remedy = "check the disk, and run again"
        try:
            with safe_open(path, "pt") as file:
                for name, tensor in self._pending.items():
                    if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                        raise OutputError(f"{name} reads back from {path} changed", remedy)
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{path} does not read back: {error}", remedy) from error

    def _name_shards(self) -> None:
        count = len(self._shards)
        where: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05}-of-{count:05}.safetensors"
            if count == 1:
                file = "model.safetensors"
            (self.folder / f"shard-{index}.safetensors").rename(self.folder / file)
            where |= dict.fromkeys(names, file)
        if count > 1:
            index_file = {"metadata": {"total_size": self._total}, "weight_map": where}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index_file, indent=2) + "\n", encoding="utf-8")


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes, which can be compared in every dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their own memory: what a .bin file ties must be written as often as it says."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if start in seen else tensor.contiguous()
        seen.add(start)
    return own


def place_of(
    target: Path, source: Checkpoint, force: bool, notice: Callable[[str], None] = lambda _: None
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
    return Whole(target, force, notice)
