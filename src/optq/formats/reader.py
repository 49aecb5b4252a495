"""Read any checkpoint, plain or quantized, into the transformers model that it stands for."""

from __future__ import annotations

from typing import Any

import torch

from optq.errors import ModelError
from optq.formats.gptq import SUFFIXES, PackedLayer, detect
from optq.model.checkpoint import Checkpoint
from optq.model.source import disk_names, empty_model, load_model


def load(checkpoint: Checkpoint) -> Any:
    """The model on the CPU; quantized layers hold their dequantized weights."""
    if detect(checkpoint.config()) is None:
        return load_model(checkpoint)
    skeleton = empty_model(checkpoint)
    dtype, transposed = skeleton.config.dtype or torch.float32, _conv1d_weights(skeleton)
    names = quantized_layers(checkpoint)
    in_model = {
        disk: name
        for name, disk in disk_names(skeleton, [f"{name}.weight" for name in names]).items()
    }
    parts = {f"{name}.{suffix}" for name in names for suffix in SUFFIXES}
    state = dict(checkpoint.tensors([name for name in checkpoint.files if name not in parts]))
    for name in names:
        if f"{name}.weight" not in in_model:
            raise ModelError(
                f"{name} has no place in {type(skeleton).__name__}",
                "check that config.json and the weights belong together",
            )
        weight = read_layer(checkpoint, name).weight().to(dtype)
        if in_model[f"{name}.weight"] in transposed:
            weight = weight.T.contiguous()
        state[f"{name}.weight"] = weight
    return load_model(checkpoint, state)


def quantized_layers(checkpoint: Checkpoint) -> list[str]:
    """The names on disk of the quantized layers. Raises :class:`ModelError` if parts lack."""
    suffix = ".qweight"
    names = [name.removesuffix(suffix) for name in checkpoint.files if name.endswith(suffix)]
    for name in names:
        for suffix in SUFFIXES:
            if f"{name}.{suffix}" not in checkpoint.files:
                raise ModelError(
                    f"{checkpoint.folder} lacks {name}.{suffix}", "copy the model again"
                )
        if f"{name}.weight" in checkpoint.files:
            raise ModelError(
                f"{checkpoint.folder} has {name}.weight beside its codes", "copy the model again"
            )
    return names


def read_layer(checkpoint: Checkpoint, name: str) -> PackedLayer:
    """One quantized layer by its name on disk."""
    found = detect(checkpoint.config())
    if found is None:
        raise ModelError(f"{checkpoint.folder} is not quantized", "give what optq quantize wrote")
    form, bits = found
    wanted = [f"{name}.{suffix}" for suffix in SUFFIXES]
    tensors = {key.removeprefix(f"{name}."): value for key, value in checkpoint.tensors(wanted)}
    form.check_parts(name, tensors, bits)
    return form.decode(tensors, bits)


def _conv1d_weights(model: Any) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, Conv1D)}
