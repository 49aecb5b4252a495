"""The transformers model that a checkpoint on disk stands for.

``from_pretrained`` on the CPU maps safetensors files into memory instead of reading them: a
weight arrives when it is first touched, and until it is written to, the system may drop its pages
again. So one block's weights at a time are in memory without any code of ours, and transformers'
own renamings and conversions hold for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from optq.errors import DataError, ModelError, SettingError
from optq.model.checkpoint import Checkpoint, first_line


def empty_model(checkpoint: Checkpoint) -> Any:
    """The model without weights: its modules and shapes only."""
    import transformers

    config, name = _configuration(checkpoint)
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def load_model(
    checkpoint: Checkpoint, prepare: Callable[[Any], Collection[str]] | None = None
) -> Any:
    """The transformers model in evaluation mode, on the CPU, in the checkpoint's own dtype.

    ``prepare`` may change the skeleton before weights arrive; it returns the names of those
    tensors that are then not for transformers to load, and no others may be left over. Raises
    :class:`ModelError` for a model that does not predict the next token, and where a tensor is
    missing, left over, or of the wrong shape.
    """
    import transformers
    from safetensors import SafetensorError

    config, name = _configuration(checkpoint)
    plain, skipped = getattr(transformers, name), set[str]()

    def build(model: Any, *arguments: Any, **options: Any) -> None:
        plain.__init__(model, *arguments, **options)
        if prepare is not None:
            skipped.update(prepare(model))

    # transformers makes the skeleton itself, so a class of its own is how to reach it.
    own: Any = type(plain.__name__, (plain,), {"__init__": build, "__module__": plain.__module__})
    with _quiet(transformers.logging):
        try:
            model, report = own.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=config.dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
        except (SafetensorError, OSError, RuntimeError, ValueError, UnpicklingError) as error:
            raise ModelError(
                f"{checkpoint.folder} cannot be loaded: {first_line(error)}",
                "check that config.json and the weights belong together, or copy the model again",
            ) from error
    model.__class__ = plain
    problems = {kind: {*map(str, report[f"{kind}_keys"])} for kind in ("missing", "mismatched")}
    if prepare:  # a plain checkpoint may hold more than the model, a quantized one not
        problems["unexpected"] = {*map(str, report["unexpected_keys"])} - skipped
    for kind, names in problems.items():
        if names:
            raise ModelError(
                f"the weights in {checkpoint.folder} do not fit {name}: {kind} {min(names)}",
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
            f"{checkpoint.folder} has no tokenizer that transformers can read",
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


def check_vocabulary(model: Any, tokens: Tensor) -> None:
    """Raises :class:`DataError` for a token id that the model has no embedding for."""
    vocabulary = model.get_input_embeddings().num_embeddings
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocabulary:
            raise DataError(
                f"token id {token} is outside the model's vocabulary of {vocabulary}",
                "use the tokenizer that belongs to the model",
            )


def positions(model: Any) -> int | None:
    """The longest sequence that the model has positions for, or None where it does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def sequence_length(model: Any, seqlen: int | None) -> int:
    """``seqlen``, checked against the model's positions; 2048 by default, if it has so many."""
    longest = positions(model)
    if seqlen is None:
        return min(2048, longest or 2048)
    if longest is not None and seqlen > longest:
        raise SettingError(
            f"seqlen {seqlen} is more than the model's {longest} positions",
            f"choose {longest} or less",
        )
    return seqlen


def _configuration(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The configuration, as of a plain model, and the name of the class it is for."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    raw = checkpoint.config()
    # A configuration runs code of its own on whatever the file says.
    errors = (ValueError, LookupError, TypeError, ArithmeticError, OSError, StrictDataclassError)
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    except errors as error:
        raise ModelError(
            f"transformers cannot read {checkpoint.folder / 'config.json'}: {first_line(error)}",
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
    names = [names] if isinstance(names, str) else names
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
