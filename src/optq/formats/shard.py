"""A file of tensors, on disk and compared bit for bit before it has its name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from optq.errors import OutputError
from optq.formats.whole import sync, writing


def save(tensors: dict[str, Tensor], path: Path, target: Path) -> None:
    """Write ``path``, a part of the checkpoint ``target``. Raises :class:`OutputError`."""
    from safetensors.torch import save_file

    new = path.with_suffix(".new")
    with writing(target):
        save_file(_unshared(tensors), new, metadata={"format": "pt"})
        new.chmod(0o644)  # safetensors makes it the owner's alone
        sync(new)
    _compare(tensors, new)
    with writing(target):
        new.rename(path)
        sync(path.parent)


def _compare(tensors: dict[str, Tensor], path: Path) -> None:
    """What is on disk is what was to be written."""
    from safetensors import SafetensorError, safe_open

    remedy = "check the disk, and run again"
    try:
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                    raise OutputError(f"{name} reads back from {path} changed", remedy)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{path} does not read back: {error}", remedy) from error


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
