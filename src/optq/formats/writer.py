"""Write a quantized checkpoint block by block, and let it appear only when it is whole.

All goes to a hidden folder beside the target: shards as the run goes, each read back and compared
bit for bit; then the tensors that stay as they are, the config and the companions of the
source. One rename makes it the target. Whatever goes wrong before, the hidden folder is removed.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optq.errors import NumericsError, OptqError, OutputError
from optq.formats.scheme import Format, LayerScheme
from optq.model.checkpoint import Checkpoint

SHARD_BYTES = 2**29  # packed weights wait for a full shard in memory
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RECORD = "optq.json"  # what the run did: settings, calibration, errors by layer


class Writer:
    """A checkpoint under way; use it as a context, call :meth:`finish` inside."""

    def __init__(self, target: Path, source: Checkpoint, form: Format, force: bool) -> None:
        self.target, self.source, self.form, self.force = target, source, form, force
        self.layers: dict[str, LayerScheme] = {}  # by name on disk
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def __enter__(self) -> Writer:
        check_target(self.target, self.source, self.force)
        with writing(self.target):
            parents = [self.target.parent, *self.target.parent.parents]
            self._made = [parent for parent in parents if not parent.exists()]
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(
                tempfile.mkdtemp(prefix=f".{self.target.name}.partial-", dir=self.target.parent)
            )
            self.folder.chmod(0o755)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:
            if not any(parent.iterdir()):  # nothing came of it
                parent.rmdir()

    def add(self, name: str, tensors: dict[str, Tensor], layer: LayerScheme) -> None:
        """Take the encoded tensors, by suffix, of the layer called ``name`` on disk."""
        self.layers[name] = layer
        self._pending |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        self._flush(SHARD_BYTES)

    def finish(
        self,
        dense: list[str],
        percdamp: float = 0.0,
        record: dict[str, Any] | None = None,
        outside: Sequence[str] = (),
        packed: Collection[str] = (),
    ) -> None:
        """Add all that is not quantized, and rename the folder to the target.

        ``dense`` and ``outside`` are the linear layers that stay as they are, inside the blocks
        and elsewhere; ``packed`` the tensors of a quantized source that :meth:`add` replaced.
        """
        replaced = {*packed, *(f"{name}.weight" for name in self.layers)}
        for name, tensor in self.source.tensors(
            [n for n in self.source.files if n not in replaced]
        ):
            if tensor.dtype in FLOATS and not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{name} holds NaN or infinity", "copy the model again, or train it again"
                )
            self._pending[name] = tensor
            self._flush(SHARD_BYTES)
        self._flush(0)
        with writing(self.target):
            self._name_shards()
            settings = self.form.config(self.layers, dense, percdamp, outside)
            config = self.source.config() | {"quantization_config": settings}
            contents = {"config.json": config, self.form.settings_file: settings, RECORD: record}
            for file, content in contents.items():
                if file is not None and content is not None:
                    path = self.folder / file
                    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for path in self.source.companions():
                if path.is_dir():
                    shutil.copytree(path, self.folder / path.name)
                elif not (self.folder / path.name).exists():
                    shutil.copy(path, self.folder / path.name)
            self._rename()

    def _flush(self, at_least: int) -> None:
        size = sum(tensor.nbytes for tensor in self._pending.values())
        if not self._pending or size < at_least:
            return
        from safetensors.torch import save_file

        path = self.folder / f"shard-{len(self._shards)}.safetensors"
        with writing(self.target):
            save_file(
                _unshared(self._pending),
                path,
                metadata={"format": "pt"},
            )
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

    def _rename(self) -> None:
        """One rename; with ``force`` the old folder steps aside first and goes last."""
        if not self.target.exists():
            self.folder.rename(self.target)
            return
        old = self.folder.with_name(self.folder.name + "-old")
        try:
            self.target.rename(old)
            self.folder.rename(self.target)
        except BaseException:  # Ctrl-C too: the old checkpoint goes back to its place
            if not self.target.exists():
                old.rename(self.target)
            raise
        old.unlink() if old.is_symlink() or old.is_file() else shutil.rmtree(old)


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


def check_target(target: Path, source: Checkpoint, force: bool) -> None:
    """Refuse a target that must not be replaced."""
    elsewhere = "choose another folder"
    with writing(target):
        model, here, place = source.folder.resolve(), Path.cwd(), target.resolve()
        if place in (model, *model.parents):
            raise OutputError(f"{target} holds the model itself", elsewhere)
        if place in (here, *here.parents):
            raise OutputError(f"{target} holds the current folder", elsewhere)
        if target.is_symlink() and not target.exists():
            raise OutputError(f"{target} is a link to nowhere", elsewhere)
        if target.exists() and not force:
            raise OutputError(f"{target} exists", f"{elsewhere}, or pass --force")
        if target.is_dir() and not (target / "config.json").exists() and any(target.iterdir()):
            raise OutputError(f"{target} holds no checkpoint", f"empty it, or {elsewhere}")
        for parent in target.absolute().parents:
            if parent.exists() and not parent.is_dir():
                raise OutputError(f"{target}: {parent} is not a folder", elsewhere)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system says while writing into an error with a remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except OptqError:
        raise
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OutputError(
                f"the disk of {target} is full", "make room, and run again"
            ) from error
        # Without the hidden folder's name, which says nothing to anyone.
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"{target} cannot be written: {reason}", "choose a folder that you may write to"
        ) from error
