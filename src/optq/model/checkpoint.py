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

from optq.errors import ModelError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json`` and weights; ``files`` maps each tensor to its file."""

    folder: Path
    files: dict[str, str]

    @classmethod
    def open(cls, model_id: str) -> Checkpoint:
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
        return cls(folder, _tensor_files(folder))

    def config(self) -> dict[str, Any]:
        """``config.json`` as it stands."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}", "copy the file again") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} is not a configuration", "copy the file again")
        return config

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


def tensor_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each tensor. Reads no weights: the files are mapped, not read."""
    return {name: tensor.nbytes for name, tensor in checkpoint.tensors()}


def _fetch(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"]
    others += ["consolidated*", "original/*", "onnx/*"]
    try:
        folder = Path(snapshot_download(model_id, ignore_patterns=others))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(model_id, allow_patterns=["*.bin", "*.bin.index.json"])
        return folder
    except HFValidationError as error:
        raise ModelError(f"{model_id} does not exist", "give a model folder or a hub id") from error
    except OSError as error:
        raise ModelError(
            f"there is no folder {model_id}, and the hub does not give it",
            "give a model folder, or check the id, your access to it, and the network",
        ) from error


def _tensor_files(folder: Path) -> dict[str, str]:
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():  # first, as in transformers
            names = {single}
        elif (folder / index).is_file():
            try:
                names = set(json.loads((folder / index).read_text())["weight_map"].values())
                names = {str(Path(name)) for name in names}
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


def first_line(error: BaseException) -> str:
    """The first sentence of an error's text, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        lines = [" ".join(lines[:2])]
    return lines[0] if lines else type(error).__name__
