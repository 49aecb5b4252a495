"""A checkpoint on disk: its tensors, its config and its other files, from a folder or the hub."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from optq.errors import ModelError

TOGETHER = "check that config.json and the weights belong together"
NAMES = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".tflite", ".gguf"),
)
# What speaks of weights that are not in the output: an adapter's, another program's, a trainer's.
STAY_BEHIND = (
    *(ADAPTER, ".*", "config.json", "*.index.json", "params.json", "openvino_*.xml"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml"),
    "trainer_state.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json`` and weights; ``files`` maps each tensor to its file.

    ``layout`` has each tensor's dtype and shape, as a tensor without values.
    """

    folder: Path
    files: dict[str, str]
    layout: dict[str, Tensor]

    @classmethod
    def open(cls, model_id: str) -> Checkpoint:
        """Open a folder, or fetch a hub id. Raises :class:`ModelError` if it is not whole."""
        folder = Path(model_id).expanduser()
        if folder.is_file():
            what = "a GGUF file, for llama.cpp" if folder.suffix == ".gguf" else "a file"
            raise ModelError(f"{model_id} is {what}", "give the folder of a model for transformers")
        if not folder.is_dir():
            folder = _fetch(model_id)
        if not (folder / "config.json").is_file():
            raise _no_model(model_id, folder)
        checkpoint = cls(folder, {}, {})
        for name in _weight_files(folder):
            found = _layout(folder / name)
            checkpoint.layout.update(found)
            checkpoint.files.update(dict.fromkeys(found, name))
        return checkpoint

    def config(self) -> dict[str, Any]:
        """``config.json`` as it stands."""
        return read_settings(self.folder / "config.json")

    def tensors(self, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The named tensors (default: all), file by file, each read when its turn comes."""
        wanted = self.files if names is None else names
        by_file: dict[str, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.files[name], []).append(name)
        for file, members in sorted(by_file.items()):
            with _open_weights(self.folder / file) as (_, get):
                for name in members:
                    yield name, get(name)

    def companions(self) -> list[Path]:
        """All but weights and what speaks of them: tokenizer, chat template, licence, .."""
        return [
            path
            for path in sorted(self.folder.iterdir())
            if (path.is_file() or path.name == "additional_chat_templates")
            and path.suffix not in WEIGHT_SUFFIXES
            and not any(fnmatch(path.name, pattern) for pattern in STAY_BEHIND)
        ]


def read_settings(path: Path) -> dict[str, Any]:
    """What a JSON file of settings says."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", "copy the file again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} is not a configuration", "copy the file again")
    return settings


def _no_model(model_id: str, folder: Path) -> ModelError:
    """What a folder without ``config.json`` is, and what to give in its place."""
    cause = f"{model_id} has no config.json"
    remedy = "give a folder that save_pretrained has written"
    if (folder / ADAPTER).is_file():
        base = read_settings(folder / ADAPTER).get("base_model_name_or_path") or "a model"
        cause = f"{model_id} is an adapter of {base}"
        remedy = (
            f"merge it first: peft.AutoPeftModelForCausalLM.from_pretrained({model_id!r})"
            ".merge_and_unload().save_pretrained(FOLDER), and copy the tokenizer's files"
        )
    elif (folder / "params.json").is_file() or list(folder.glob("consolidated*")):
        cause += ", and weights in the layout of their makers"
    elif list(folder.glob("*.gguf")):
        cause += ", and GGUF files, made for llama.cpp"
    elif inner := sorted(folder.glob("*/config.json")):
        cause += f", and {inner[0].parent.name} inside it has"
        remedy = f"give {inner[0].parent}"
    return ModelError(cause, remedy)


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


def _weight_files(folder: Path) -> list[str]:
    """The files that hold the tensors: where transformers looks, or the only ones there are."""
    names = [f"{name}{end}" for name in NAMES for end in ("", ".index.json")]  # as transformers
    for pattern in ("*.safetensors.index.json", "*.safetensors"):  # gptq_model-4bit-128g, ..
        found = sorted(path.name for path in folder.glob(pattern))
        found = [name for name in found if not name.startswith(("adapter_model", "consolidated"))]
        if len(found) == 1:
            names += found
    for path in (folder / name for name in names):
        if path.is_file() and path.suffix != ".json":
            return [path.name]
        if path.is_file():
            try:
                members = set(json.loads(path.read_text())["weight_map"].values())
                return sorted({str(Path(name)) for name in members})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{path} is not an index", "copy the file again") from error
    cause = f"{folder} has {', '.join(found)}, and no index of them"
    raise ModelError(
        cause if found else f"{folder} has no weights", f"give a folder with {' or '.join(NAMES)}"
    )


def _layout(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        with _open_weights(path) as (names, get):
            return {name: get(name).to("meta") for name in names}
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", "copy the model again, with all files") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ModelError(
            f"{path} is truncated or corrupt: {first_line(error)}", "copy the file again"
        ) from error
    except (AttributeError, TypeError) as error:  # a pickle can hold anything
        raise ModelError(f"{path} does not hold tensors by name", TOGETHER) from error


@contextmanager
def _open_weights(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """The names of a file's tensors, and a function that gives one; they are mapped, not read."""
    from safetensors import safe_open

    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            yield list(file.keys()), file.get_tensor
        return
    # Files of torch before 1.6 are no zip archives, and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    state = torch.load(path, mmap=mapped, weights_only=True, map_location="cpu")
    yield list(state), state.__getitem__


def first_line(error: BaseException) -> str:
    """The first sentence of an error's text, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        lines = [" ".join(lines[:2])]
    return lines[0] if lines else type(error).__name__
