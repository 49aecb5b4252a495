"""A checkpoint on disk: its tensors, its config and its other files, from a folder or the hub."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from optq.boundary import first_line, library, short
from optq.errors import ModelError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json`` and weights; ``files`` maps each tensor to its file.

    ``dtype``: what the model runs in, and is to be run in, where that is not what its config says.
    Its tensors on disk stay as they are: whoever loads them casts them, and to the same values.
    """

    folder: Path
    files: dict[str, str]
    dtype: torch.dtype | None = None

    @classmethod
    def open(cls, model_id: str, dtype: torch.dtype | None = None) -> Checkpoint:
        """Open a folder, or fetch a hub id. Raises :class:`ModelError` if it is not whole."""
        folder = Path(model_id).expanduser()
        if folder.is_file():
            raise ModelError(f"{model_id} is a file", "give the folder that it lies in")
        if not folder.is_dir():
            folder = _fetch(model_id)
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{model_id} has no config.json", "give a folder that save_pretrained has written"
            )
        return cls(folder, _tensor_files(folder), dtype)

    def config(self) -> dict[str, Any]:
        """``config.json`` as it stands, but for :attr:`dtype`."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            remedy = "copy the file again, or save it as UTF-8 without a byte-order mark"
            raise ModelError(f"{path} is not JSON: {first_line(error)}", remedy) from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} is not a configuration", "copy the file again")
        return config if self.dtype is None else _in_dtype(config, self.dtype)

    def tensors(self, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The named tensors (default: all), file by file, each read when its turn comes."""
        wanted = self.files if names is None else names
        by_file: dict[str, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.files[name], []).append(name)
        for file, members in sorted(by_file.items()):
            with _open_weights(self.folder / file) as get:
                for name in members:
                    yield name, get(name)

    def companions(self) -> list[Path]:
        """All but weights and config: tokenizer, chat template, generation config, .."""
        return [
            path
            for path in sorted(self.folder.iterdir())
            if (path.is_file() or path.name == "additional_chat_templates")
            and not path.name.startswith(".")
            and path.suffix not in WEIGHT_SUFFIXES
            and not path.name.endswith(".index.json")
            and path.name not in ("config.json", "quantize_config.json")
        ]


def _in_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config, and those inside it, with another dtype."""
    name = "dtype" if "dtype" in config else "torch_dtype"  # which older programs read as well
    inner = {
        key: _in_dtype(value, dtype)
        for key, value in config.items()
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"
    }
    return config | inner | {name: str(dtype).removeprefix("torch.")}


def tensor_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each tensor. Reads no weights: the files are mapped, not read."""
    return {name: tensor.nbytes for name, tensor in checkpoint.tensors()}


def _fetch(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        cause = f"{short(model_id, 200)} does not exist"
        raise ModelError(cause, "give a model folder or a hub id") from error
    others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"]
    others += ["consolidated*", "original/*", "onnx/*"]
    cause = f"there is no folder {short(model_id, 200)}, and the hub does not give it"
    remedy = "give a model folder, or check the id, your access to it, and the network"
    with library(ModelError, cause, remedy):
        folder = Path(snapshot_download(model_id, ignore_patterns=others))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(model_id, allow_patterns=["*.bin", "*.bin.index.json"])
    return folder


def _tensor_files(folder: Path) -> dict[str, str]:
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():  # first, as in transformers
            names = {single}
        elif (folder / index).is_file():
            try:
                whole = json.loads((folder / index).read_text(encoding="utf-8"))
                names = {str(Path(name)) for name in whole["weight_map"].values()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(
                    f"{folder / index} is not an index", "copy the file again"
                ) from error
        else:
            continue
        files: dict[str, str] = {}
        for name in sorted(names):
            files |= dict.fromkeys(_names_in(folder / name), name)
        return files
    raise ModelError(
        f"{folder} has no weights", "give a folder with model.safetensors or pytorch_model.bin"
    )


def _names_in(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return list(file.keys())
        return list(_load_pickle(path))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", "copy the model again, with all files") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ModelError(
            f"{path} is truncated or corrupt: {first_line(error)}", "copy the file again"
        ) from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    # Files of torch before 1.6 are no zip archives, and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    return torch.load(path, mmap=mapped, weights_only=True, map_location="cpu")


class _open_weights:  # noqa: N801  reads like the function it is
    """A context that gives a function from a tensor's name to the tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        from safetensors import safe_open

        if self.path.suffix == ".safetensors":
            self.file: Any = safe_open(self.path, "pt").__enter__()
            return self.file.get_tensor
        self.file = None
        return _load_pickle(self.path).__getitem__

    def __exit__(self, *error: Any) -> None:
        if self.file is not None:
            self.file.__exit__(*error)
