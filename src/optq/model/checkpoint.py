"""A checkpoint on disk: its tensors, its config and its other files, from a folder or the hub."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from optq.boundary import first_line
from optq.errors import ModelError
from optq.model.hub import Hub, fetch

TOGETHER = "check that config.json and the weights belong together"
NAMES = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".tflite", ".gguf"),
)
# What headers of safetensors files call them.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
# What speaks of weights that are not in the output: an adapter's, another program's, a trainer's.
STAY_BEHIND = (
    *(ADAPTER, ".*", "config.json", "*.index.json", "params.json", "openvino_*.xml"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml"),
    *("trainer_state.json", "optq_report.html", "optq_eval.json"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json`` and weights; ``files`` maps each tensor to its file.

    ``layout`` has each tensor's dtype and shape, as a tensor without values. ``dtype``: what the
    model is to be run in, where that is not what its config says. Its tensors on disk stay as they
    are: whoever loads them casts them, and to the same values. ``hub``: where files that are not in
    the folder yet come from. ``whole``: every file is as long as its header says; what is made for
    a plan needs the headers alone.
    """

    folder: Path
    files: dict[str, str]
    layout: dict[str, Tensor]
    dtype: torch.dtype | None = None
    hub: Hub | None = None
    whole: bool = True

    @classmethod
    def open(
        cls, model_id: str, dtype: torch.dtype | None = None, whole: bool = True
    ) -> Checkpoint:
        """Open a folder, or fetch a hub id. Raises :class:`ModelError` if it is not ``whole``."""
        folder = Path(model_id).expanduser()
        if folder.is_file():
            what = "a GGUF file, for llama.cpp" if folder.suffix == ".gguf" else "a file"
            raise ModelError(f"{model_id} is {what}", "give the folder of a model for transformers")
        hub, shards = None, list[str]()
        if not folder.is_dir():
            folder, hub, shards = fetch(model_id, WEIGHT_SUFFIXES)
        if not (folder / "config.json").is_file():
            raise _no_model(model_id, folder)
        checkpoint = cls(folder, {}, {}, dtype, hub, whole)
        for name in _weight_files(folder, shards):
            found = checkpoint._promised(name) or _layout(checkpoint.path(name), whole)
            checkpoint.layout.update(found)
            checkpoint.files.update(dict.fromkeys(found, name))
        return checkpoint

    def config(self) -> dict[str, Any]:
        """``config.json`` as it stands, but for :attr:`dtype`."""
        config = read_settings(self.folder / "config.json")
        return config if self.dtype is None else _in_dtype(config, self.dtype)

    def tensors(self, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The named tensors (default: all), file by file, each read when its turn comes.

        Raises :class:`ModelError` for a file that was damaged or changed since it was opened.
        """
        wanted = self.files if names is None else names
        by_file: dict[str, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.files[name], []).append(name)
        for file, members in sorted(by_file.items()):
            path = self.path(file)
            with _damage(path), _open_weights(path) as (_, get):
                for name in members:
                    yield name, get(name)

    def path(self, file: str) -> Path:
        """A file of weights, downloaded if it is not here yet."""
        if self.hub and not (self.folder / file).exists():
            self.hub.download(file)
        return self.folder / file

    def _promised(self, file: str) -> dict[str, Tensor] | None:
        """What is in a file that is still on the hub; None where it has to come to be known."""
        if self.hub is None or (self.folder / file).exists():
            return None
        header = self.hub.header(file)
        if not all(dtype in DTYPES for dtype, _ in header.values()):
            return None
        return {
            name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            for name, (dtype, shape) in header.items()
        }

    def own(self, name: str) -> bool:
        """Whether a tensor is memory of its own when it comes, not a file's that is mapped."""
        return False

    @property
    def mapped(self) -> bool:
        """Whether a tensor can be had without reading its whole file."""
        return all(_is_mapped(self.folder / file) for file in {*self.files.values()})

    def cut(self) -> Path | None:
        """A safetensors file that is shorter than its header says, if there is one."""
        for path in (self.folder / file for file in dict.fromkeys(self.files.values())):
            here = path.suffix == ".safetensors" and path.exists()  # or still on the hub
            if here and path.stat().st_size < _header(path)[1]:
                return path
        return None

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
        remedy = "copy the file again, or save it as UTF-8 without a byte-order mark"
        raise ModelError(f"{path} is not JSON: {first_line(error)}", remedy) from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} is not a configuration", "copy the file again")
    return settings


def _in_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config, and those inside it, with another dtype."""
    name = "dtype" if "dtype" in config else "torch_dtype"  # which older programs read as well
    inner = {
        key: _in_dtype(value, dtype)
        for key, value in config.items()
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"
    }
    return config | inner | {name: str(dtype).removeprefix("torch.")}


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


def _weight_files(folder: Path, to_come: list[str]) -> list[str]:
    """The files that hold the tensors: where transformers looks, or the only ones there are."""
    there = sorted({*to_come, *(path.name for path in folder.iterdir() if path.is_file())})
    names = [f"{name}{end}" for name in NAMES for end in ("", ".index.json")]  # as transformers
    for pattern in ("*.safetensors.index.json", "*.safetensors"):  # gptq_model-4bit-128g, ..
        found = [name for name in there if fnmatch(name, pattern)]
        found = [name for name in found if not name.startswith(("adapter_model", "consolidated"))]
        if len(found) == 1:
            names += found
    for path in (folder / name for name in names if name in there):
        if path.suffix != ".json":
            return [path.name]
        try:
            members = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            return sorted({str(Path(name)) for name in members})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is not an index", "copy the file again") from error
    cause = f"{folder} has {', '.join(found)}, and no index of them"
    raise ModelError(
        cause if found else f"{folder} has no weights", f"give a folder with {' or '.join(NAMES)}"
    )


def _layout(path: Path, whole: bool) -> dict[str, Tensor]:
    """What a file's tensors are; of one that is not ``whole``, where its header says that."""
    with _damage(path):
        if path.suffix == ".safetensors":
            entries, length = _header(path)
            if length and (path.stat().st_size == length or not whole):
                return {
                    name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
                    for name, (dtype, shape) in entries.items()
                }
        with _open_weights(path) as (names, get):  # or what it says is wrong
            return {name: get(name).to("meta") for name in names}


def _header(path: Path) -> tuple[dict[str, tuple[str, list[int]]], int]:
    """Dtype and shape of each tensor of a safetensors file, and how long the file must be.

    Nothing for a header that is not as we know it: safetensors then says what is wrong with it.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            return {}, 0
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: (own["dtype"], own["shape"]) for name, own in header.items()}
            end = 0
            for name, (dtype, shape) in entries.items():
                start, stop = header[name]["data_offsets"]
                end = max(end, stop)
                if prod(shape) * DTYPES[dtype].itemsize != stop - start:
                    return {}, 0
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}, 0
    return entries, 8 + length + end


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What reading a file of weights raises, as a :class:`ModelError` that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", "copy the model again, with all files") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ModelError(
            f"{path} is truncated or corrupt: {first_line(error)}", "copy the file again"
        ) from error
    except (AttributeError, TypeError) as error:  # a pickle can hold anything
        raise ModelError(f"{path} does not hold tensors by name", TOGETHER) from error
    except KeyError as error:
        raise ModelError(f"{path} no longer holds {error}", "copy the file again") from error


@contextmanager
def _open_weights(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """The names of a file's tensors, and a function that gives one; they are mapped, not read."""
    from safetensors import safe_open

    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            yield list(file.keys()), file.get_tensor
        return
    state = torch.load(path, mmap=_is_mapped(path), weights_only=True, map_location="cpu")
    yield list(state), state.__getitem__


def _is_mapped(path: Path) -> bool:
    """Files of torch before 1.6 are no zip archives, and cannot be mapped."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)
