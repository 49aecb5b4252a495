"""On-disk formats: read, write, detect. One file and one row of ``FORMATS`` each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optq.core.weight import UNCODED, LayerScheme
from optq.errors import ModelError, OtherMethodError, SettingError
from optq.formats.compressed_tensors import COMPRESSED_TENSORS
from optq.formats.dense import DENSE
from optq.formats.gptq import GPTQ_V1, GPTQ_V2
from optq.formats.int_quantized import INT_QUANTIZED
from optq.formats.scheme import Detected, Format
from optq.model.checkpoint import Checkpoint, read_settings

FORMATS: dict[str, Format] = {row.name: row for row in (GPTQ_V1, GPTQ_V2, COMPRESSED_TENSORS)}
# What the same name stands for where activations are quantized too.
WITH_ACTIVATIONS: dict[str, Format] = {COMPRESSED_TENSORS.name: INT_QUANTIZED}
REMEDY = f"give a plain model, or one in {', '.join(FORMATS)}"
PLAIN = (
    "give the plain model; or load it in transformers with its quantization config's"
    " dequantize=True (fp8, mxfp4), and save it in bfloat16"
)
# Where other programs keep what they did, if not in config.json.
OF_THEIR_OWN = {"quant_config.json": "AutoAWQ", "hf_quant_config.json": "ModelOpt"}


def detect(checkpoint: Checkpoint) -> Detected | None:
    """The scheme of a quantized checkpoint, or None for a plain model.

    Raises :class:`ModelError` for a method that no format of ours holds, and for weights that are
    codes, and nothing says how: read as numbers they would be another model.
    """
    settings, scheme = quantization(checkpoint), None
    if settings is not None:
        forms = (*FORMATS.values(), *WITH_ACTIVATIONS.values())
        scheme = next(filter(None, (form.detect(settings) for form in forms)), None)
        if scheme is None:
            unnamed = "bitsandbytes" if "load_in_4bit" in settings else "an unnamed method"
            method = settings.get("quant_method", unnamed)
            raise OtherMethodError(f"the model is quantized with {method}", REMEDY)
    explained = () if scheme is None else scheme.form.parts
    name = next(_codes(checkpoint.layout, explained), None)
    if name is None:
        return scheme
    for file, program in OF_THEIR_OWN.items():
        if (checkpoint.folder / file).is_file():
            raise OtherMethodError(
                f"the model is quantized with {program}, says its {file}", REMEDY
            )
    what = f"{name} ({checkpoint.layout[name].dtype})".replace("torch.", "")
    raise OtherMethodError(
        f"{what} is of a quantized model, and config.json does not say how", REMEDY
    )


def form_of(name: str | None, layer: LayerScheme) -> Format:
    """The format that users call ``name``, for layers of this scheme; None: the usual one.

    Raises ``SettingError`` for a name that none has, and for any where there are no codes.
    """
    if layer.wbits == UNCODED:
        if name is None:
            return DENSE
        cause = f"a model that is pruned only has no codes for the format {name}"
        raise SettingError(cause, "leave out --format, or quantize it as well with --wbits")
    usual = GPTQ_V1 if layer.abits is None else COMPRESSED_TENSORS
    name = usual.name if name is None else name
    if name not in FORMATS:
        raise SettingError(f"the format {name} is unknown", f"choose {' or '.join(FORMATS)}")
    return (WITH_ACTIVATIONS if layer.abits is not None else {}).get(name, FORMATS[name])


def quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The settings of a quantized checkpoint; those in a file of their own if it has codes."""
    config = checkpoint.config()
    settings = config.get("quantization_config") or None  # an empty one says nothing
    if settings is None:
        for place in _places(config):
            where = f"{REMEDY}, with the settings in quantization_config"
            raise OtherMethodError(f"the model is quantized, says config.json in {place}", where)
        path = checkpoint.folder / "quantize_config.json"  # AutoGPTQ's first layout
        if path.is_file() and next(_codes(checkpoint.layout, ()), None):
            settings = {"quant_method": "gptq"} | read_settings(path)
    if settings is not None and not isinstance(settings, dict):
        raise ModelError("the quantization_config is no configuration", "copy config.json again")
    return settings


def require_plain(checkpoint: Checkpoint) -> None:
    """Raises :class:`ModelError` for a model that is quantized already."""
    try:
        found = detect(checkpoint)
    except OtherMethodError as error:
        raise ModelError(error.cause, PLAIN) from error
    if found:
        raise ModelError(f"{checkpoint.folder} is quantized already", "give the plain model")


def _codes(layout: dict[str, Tensor], explained: tuple[str, ...]) -> Iterator[str]:
    """The names of tensors that are codes or belong to codes, other than those ``explained``.

    Masks and positions that models keep as buffers are not: their values are booleans, int64, or
    of one row.
    """
    packed = {form.suffixes[0] for form in FORMATS.values()}
    for name, tensor in layout.items():
        module, _, suffix = name.rpartition(".")
        if suffix in explained:
            continue
        if tensor.is_floating_point():
            beside = layout.get(f"{module}.weight", torch.empty(0)).ndim == 2
            found = tensor.itemsize == 1 or ("scale" in suffix and beside)
        else:
            small = tensor.itemsize < 8 and tensor.dtype != torch.bool
            found = tensor.ndim > 1 and (suffix == "weight" or (small and len(tensor) > 1))
        if found or suffix in packed:
            yield name


def _places(config: dict[str, Any], above: str = "") -> Iterator[str]:
    """Where a configuration has settings of a quantization, if not where they belong."""
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value:
            yield above + key
        elif isinstance(value, dict):
            yield from _places(value, f"{above}{key}.")
