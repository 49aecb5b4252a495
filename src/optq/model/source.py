"""The transformers model that a checkpoint on disk stands for.

Safetensors files are mapped into memory instead of read: a weight arrives when it is first
touched, and until it is written to, the system may drop its pages again. ``from_pretrained`` on
the CPU takes such tensors as they are, so one block's weights at a time are in memory, and its own
renamings and conversions hold for every architecture. It is given tensors, not the folder: which
files hold them is asked once, and an adapter that lies beside them does not get into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optq.boundary import library
from optq.errors import DataError, ModelError, SettingError
from optq.model.checkpoint import TOGETHER, Checkpoint
from optq.model.lacking import misshapen, wrong_expert
from optq.model.names import disk_names

NO_CODE = "OPTQ runs no code that a model brings"


def empty_model(checkpoint: Checkpoint) -> Any:
    """The model without weights: its modules and shapes only."""
    config, plain = _configuration(checkpoint)
    with torch.device("meta"), library(*unloadable(checkpoint)):
        return plain(config)


def load_model(
    checkpoint: Checkpoint,
    prepare: Callable[[Any, dict[str, Any]], Collection[str]] | None = None,
) -> Any:
    """The transformers model in evaluation mode, on the CPU, in the checkpoint's own dtype.

    ``prepare`` may change the skeleton and the tensors, by name on disk, before they meet: each is
    None, and read only if it still is. It returns the names of those tensors that are then not for
    transformers to load, and their modules may have no others left over. Tensors of modules that
    the model does not have are ignored, as transformers does. Raises :class:`ModelError` for a
    model that does not predict the next token, and where a tensor is missing, left over, or of the
    wrong shape.
    """
    import transformers

    config, plain = _configuration(checkpoint)
    skipped, failed = set[str](), list[Exception]()

    def build(model: Any, *arguments: Any, **options: Any) -> None:
        plain.__init__(model, *arguments, **options)
        try:
            skipped.update(prepare(model, tensors) if prepare else ())
            tensors.update(checkpoint.tensors([n for n, t in tensors.items() if t is None]))
        except Exception as error:
            failed.append(error)
            raise

    # transformers makes the skeleton itself, so a class of its own is how to reach it.
    own: Any = type(plain.__name__, (plain,), {"__init__": build, "__module__": plain.__module__})
    refusal, cause, remedy = unloadable(checkpoint)
    unfit = f"the weights in {checkpoint.folder} do not fit {plain.__name__}"

    def explained(error: Exception) -> str:
        if expert := wrong_expert(empty_model(checkpoint), checkpoint.layout):
            raise ModelError(f"{unfit}: {expert}", remedy) from error
        if "above report" in str(error):  # which nobody sees
            raise ModelError(f"{unfit}: some that it merges are at odds", remedy) from error
        return remedy

    tensors: dict[str, Any] = dict.fromkeys(checkpoint.files)
    with quiet(), library(refusal, cause, explained, failed):
        model, report = own.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=config.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
        if (checkpoint.folder / "generation_config.json").is_file():
            kind = transformers.GenerationConfig
            model.generation_config = kind.from_pretrained(checkpoint.folder)
    model.__class__ = plain
    tensors.clear()  # which that class holds, and itself, until the collector comes by
    problems = {"missing ": {*map(str, report["missing_keys"])}}
    problems[""] = {misshapen(*each) for each in report["mismatched_keys"]}
    misfits = any(problems.values())
    if misfits and (expert := wrong_expert(empty_model(checkpoint), checkpoint.layout)):
        raise ModelError(f"{unfit}: {expert}", remedy)
    modules = {name.rpartition(".")[0] for name in skipped}
    left = {*map(str, report["unexpected_keys"])} - skipped
    # A checkpoint may hold more than the model, but not if the class is a guess.
    guessed = config.architectures and plain.__name__ not in config.architectures
    problems["unexpected "] = {n for n in left if guessed or n.rpartition(".")[0] in modules}
    for kind, names in problems.items():
        if names:
            raise ModelError(f"{unfit}: {kind}{min(names)}", TOGETHER)
    return model.eval()


def unloadable(checkpoint: Checkpoint) -> tuple[type[ModelError], str, str]:
    """What to raise for whatever transformers raises while it loads the checkpoint."""
    remedy = "check that config.json and the weights belong together, or copy the model again"
    return ModelError, f"{checkpoint.folder} cannot be loaded", remedy


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises :class:`ModelError` where it has none."""
    import transformers

    folder = checkpoint.folder

    def remedy(error: Exception) -> str:
        if lacking := _lacking(folder, error):
            return f"run `pip install {' '.join(lacking)}`, which its file needs"
        if "trust_remote_code" in str(error):
            return f"{NO_CODE}: give it a tokenizer.json, and no auto_map in tokenizer_config.json"
        return "copy the tokenizer's files of the model there, or update transformers"

    cause = f"{folder} has no tokenizer that transformers can read"
    with quiet(), library(ModelError, cause, remedy):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _lacking(folder: Path, error: Exception) -> list[str]:
    """The packages for want of which a tokenizer was not read."""
    causes = (error, error.__context__)
    said = str(error).lower() if any(isinstance(each, ImportError) for each in causes) else ""
    # What SentencePiece wrote begins with a line end. Without it transformers blames tiktoken.
    models = [] if (folder / "tokenizer.json").exists() else folder.glob("*.model")
    if any(path.read_bytes()[:1] == b"\n" for path in models):
        said = "sentencepiece protobuf"
    here = {each.name for each in distributions()}
    needed = ("sentencepiece", "protobuf", "tiktoken", "blobfile")
    return [package for package in needed if package in said and package not in here]


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


def _configuration(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The configuration, as of a plain model and true to the file, and the class it is for."""
    import transformers

    raw = checkpoint.config()

    def remedy(error: Exception) -> str:
        if raw.get("auto_map") and str(raw.get("model_type")) not in transformers.CONFIG_MAPPING:
            return f"{NO_CODE}: look for a copy converted to a class that transformers has"
        return "update transformers, or check the file"

    cause = f"transformers cannot read {checkpoint.folder / 'config.json'}"
    with quiet(), library(ModelError, cause, remedy):
        # Where transformers has a class, it takes that one; else it refuses, and asks nobody.
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = getattr(transformers, _architecture(raw, config))
    if raw.get("tie_word_embeddings") is False:  # of a checkpoint that is given a head as well
        config.tie_word_embeddings = False
    if getattr(config, "tie_word_embeddings", False):
        with torch.device("meta"), library(*unloadable(checkpoint)):
            skeleton = plain(config)
        config.tie_word_embeddings = not _has_own_head(skeleton, checkpoint)
    if config.dtype is None:
        dtypes = [tensor.dtype for n, tensor in checkpoint.layout.items() if n.endswith("weight")]
        config.dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    config.dtype = checkpoint.dtype or config.dtype
    return config, plain


def _has_own_head(model: Any, checkpoint: Checkpoint) -> bool:
    """Whether the file has a head that is not the embedding, though ``config.json`` ties the two.

    transformers takes the file's; a packed one is never the embedding. Without values it is not.
    """
    if not checkpoint.whole:
        return False
    modules = {name.rpartition(".")[0] for name in checkpoint.files if not name.endswith("bias")}
    on_disk = disk_names(model, [f"{module}.weight" for module in modules])
    for pair in model.all_tied_weights_keys.items():
        if on_disk.keys() >= {*pair}:
            dense = [on_disk[name] for name in pair if on_disk[name] in checkpoint.files]
            tensors = [tensor for _, tensor in checkpoint.tensors(dense)]
            if len(tensors) < 2 or not torch.equal(*tensors):
                return True
    return False


def _architecture(raw: dict[str, Any], config: Any) -> str:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known = {*causal.values(), *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    names = raw.get("architectures") or []
    names = [str(name) for name in names] if isinstance(names, list) else [str(names)]
    # No name, an old one or one of the model's own code: the model type says enough.
    unheard = not any(hasattr(transformers, name) for name in names)
    if unheard and config.model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        names.append(causal.get(config.model_type, config.model_type))
    if not config.is_encoder_decoder:
        for name in names:
            if name in known:
                return name
    raise ModelError(
        f"{[*names, config.model_type][0]} is not a causal language model",
        "give a decoder-only model that transformers knows, such as a ...ForCausalLM",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no load report: what matters in them becomes an error."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
