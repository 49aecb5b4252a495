"""Read any checkpoint, plain or quantized, into the transformers model that it stands for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optq.errors import ModelError
from optq.formats.gptq import SUFFIXES, PackedLayer, detect
from optq.model.checkpoint import Checkpoint
from optq.model.source import disk_names, empty_model, load_model


def load(checkpoint: Checkpoint) -> Any:
    """The model on the CPU; quantized layers hold their dequantized weights."""
    if detect(checkpoint.config()) is None:
        return load_model(checkpoint)
    layers, state = read(checkpoint)
    dense = {f"{name}.weight": layer for name, layer in layers.items()}
    skeleton = empty_model(checkpoint)
    transposed = _conv1d_weights(skeleton)
    in_model = {disk: name for name, disk in disk_names(skeleton, dense).items()}
    for name, layer in dense.items():
        if name not in in_model:
            raise ModelError(
                f"{name} has no place in {type(skeleton).__name__}",
                "check that config.json and the weights belong together",
            )
        weight = layer.weight()
        state[name] = weight.T.contiguous() if in_model[name] in transposed else weight
    return load_model(checkpoint, state)


def read(checkpoint: Checkpoint) -> tuple[dict[str, PackedLayer], dict[str, Tensor]]:
    """The quantized layers by their name on disk, and all other tensors."""
    found = detect(checkpoint.config())
    if found is None:
        raise ModelError(f"{checkpoint.folder} is not quantized", "give what optq quantize wrote")
    form, bits = found
    names = [
        name.removesuffix(".qweight") for name in checkpoint.files if name.endswith(".qweight")
    ]
    parts = {f"{name}.{suffix}" for name in names for suffix in SUFFIXES}
    missing = sorted(parts - set(checkpoint.files))
    if missing:
        raise ModelError(f"{checkpoint.folder} lacks {missing[0]}", "copy the model again")
    both = sorted(name for name in names if f"{name}.weight" in checkpoint.files)
    if both:
        raise ModelError(
            f"{checkpoint.folder} has {both[0]}.weight beside its codes", "copy the model again"
        )
    tensors = dict(checkpoint.tensors())
    for name in names:
        form.check_parts(name, {s: tensors[f"{name}.{s}"] for s in SUFFIXES}, bits)
    layers = {
        name: form.decode({suffix: tensors[f"{name}.{suffix}"] for suffix in SUFFIXES}, bits)
        for name in names
    }
    return layers, {name: tensor for name, tensor in tensors.items() if name not in parts}


def _conv1d_weights(model: Any) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, Conv1D)}
