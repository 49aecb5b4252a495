"""A checkpoint on disk: its tensors, its other files, and the model that transformers makes of it.

``from_pretrained`` on the CPU maps safetensors files into memory instead of reading them: a
weight arrives when it is first touched, and until it is written to, the system may drop its pages
again. So one block's weights at a time are in memory without any code of ours, and transformers'
own renamings and conversions hold for every architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
        if not folder.is_dir():
            folder = _fetch(model_id)
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{model_id} has no config.json", "give a folder that save_pretrained has written"
            )
        return cls(folder, _tensor_files(folder))

    def config(self) -> dict[str, Any]:
        """``config.json`` as it stands."""
        try:
            return json.loads((self.folder / "config.json").read_text())
        except ValueError as error:
            raise ModelError(
                f"{self.folder / 'config.json'} is not JSON: {error}", "copy the file again"
            ) from error

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
            if path.is_file()
            and not path.name.startswith(".")
            and path.suffix not in WEIGHT_SUFFIXES
            and not path.name.endswith(".index.json")
            and path.name not in ("config.json", "quantize_config.json")
        ]


def tensor_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each tensor. Reads no weights: the files are mapped, not read."""
    return {name: tensor.nbytes for name, tensor in checkpoint.tensors()}


def empty_model(checkpoint: Checkpoint) -> Any:
    """The model without weights: its modules and shapes only."""
    import transformers

    config, name = _configuration(checkpoint)
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def load_model(checkpoint: Checkpoint, state: dict[str, Tensor] | None = None) -> Any:
    """The transformers model in evaluation mode, on the CPU, in the checkpoint's own dtype.

    ``state`` replaces the weights on disk (same names). Raises :class:`ModelError` for a model
    that does not predict the next token, and where a tensor is missing or of the wrong shape.
    """
    import transformers
    from safetensors import SafetensorError

    config, name = _configuration(checkpoint)
    with _quiet(transformers.logging):
        try:
            model, report = getattr(transformers, name).from_pretrained(
                checkpoint.folder if state is None else None,
                config=config,
                state_dict=state,
                dtype=config.dtype or "auto",
                output_loading_info=True,
            )
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"{checkpoint.folder} cannot be loaded: {_line(error)}",
                "check that config.json and the weights belong together, or copy the model again",
            ) from error
    for problem in ("missing", "mismatched"):
        names = sorted(map(str, report[f"{problem}_keys"]))
        if names:
            raise ModelError(
                f"the weights in {checkpoint.folder} do not fit {name}: {problem} {names[0]}",
                "check that config.json and the weights belong together",
            )
    return model.eval()


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises :class:`ModelError` where it has none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{checkpoint.folder} has no tokenizer that transformers can read: {_line(error)}",
            "copy the tokenizer's files of the model into that folder",
        ) from error


def disk_names(model: Any, names_on_disk: Iterable[str]) -> dict[str, str]:
    """The name on disk of each of the model's tensors that stands there one to one.

    transformers 5 renames while it loads (``language_model.model.`` becomes
    ``model.language_model.``, a base model's tensors get their prefix); this asks it for the same
    renamings. Tensors that it merges from several on disk are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()
    names: dict[str, str] = {}
    for on_disk in names_on_disk:
        in_model, converted = rename_source_key(
            on_disk, renamings, converters, model.base_model_prefix, state
        )
        if converted is None and in_model in state:
            names[in_model] = on_disk
    return names


def positions(model: Any) -> int | None:
    """The longest sequence that the model has positions for, or None where it does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def _configuration(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The configuration, as of a plain model, and the name of the class it is for."""
    import transformers

    raw = checkpoint.config()
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"transformers cannot read {checkpoint.folder / 'config.json'}: {_line(error)}",
            "update transformers, or check the file",
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, _architecture(raw, config)


def _architecture(raw: dict[str, Any], config: Any) -> str:
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known = {*causal.values(), *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    names = raw.get("architectures") or []
    if not names and config.model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        names = [causal.get(config.model_type)]
    if not config.is_encoder_decoder:
        for name in names:
            if name in known:
                return name
    raise ModelError(
        f"{names[0] if names else config.model_type} is not a causal language model",
        "give a decoder-only model that transformers knows, such as a ...ForCausalLM",
    )


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No progress bar and no load report: what matters in them becomes an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _fetch(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"]
    try:
        folder = Path(snapshot_download(model_id, ignore_patterns=[*others, "*/*"]))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(model_id, allow_patterns=["*.bin", "*.bin.index.json"])
        return folder
    except HFValidationError as error:
        raise ModelError(f"{model_id} does not exist", "give a model folder or a hub id") from error
    except OSError as error:
        raise ModelError(
            f"{model_id} is not a folder, and the hub does not give it: {_line(error)}",
            "give a model folder, or check the id and the network",
        ) from error


def _tensor_files(folder: Path) -> dict[str, str]:
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            try:
                names = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (ValueError, KeyError) as error:
                raise ModelError(
                    f"{folder / index} is not an index", "copy the file again"
                ) from error
        elif (folder / single).is_file():
            names = {single}
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
        return list(torch.load(path, mmap=True, weights_only=True, map_location="cpu"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", "copy the model again, with all files") from error
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{path} is truncated or corrupt: {_line(error)}", "copy the file again"
        ) from error


class _open_weights:  # noqa: N801  reads like the function it is
    """A context that gives a function from a tensor's name to the tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        from safetensors import safe_open

        if self.path.suffix == ".safetensors":
            self.file: Any = safe_open(self.path, "pt").__enter__()
            return self.file.get_tensor
        state = torch.load(self.path, mmap=True, weights_only=True, map_location="cpu")
        self.file = None
        return state.__getitem__

    def __exit__(self, *error: Any) -> None:
        if self.file is not None:
            self.file.__exit__(*error)


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
