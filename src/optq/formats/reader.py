"""Read any checkpoint, plain or quantized, into a transformers model that runs."""

from __future__ import annotations

from typing import Any

import torch

from optq.core.weight import QuantizedWeight
from optq.errors import ModelError
from optq.formats import detect
from optq.formats.scheme import Detected, Format
from optq.model.checkpoint import TOGETHER, Checkpoint
from optq.model.linear import fill, make_room
from optq.model.source import load_model

CPU = torch.device("cpu")


def load_checkpoint(checkpoint: Checkpoint, device: torch.device = CPU) -> Any:
    """The model on ``device``; quantized layers are :class:`optq.model.linear.QuantizedLinear`.

    One layer at a time is in memory unpacked. Raises :class:`ModelError` for a tensor that is
    missing, at odds with the config, or left over of a packed layer.
    """
    scheme = detect(checkpoint)
    if scheme is None:
        return load_model(checkpoint).to(device)
    names = quantized_layers(checkpoint)
    places: dict[str, str] = {}

    def prepare(skeleton: Any, tensors: dict[str, Any]) -> set[str]:
        """Room for packed layers, and what their tensors are called, on disk or renamed."""
        for part in packed_tensors(checkpoint):
            del tensors[part]
        places.update(make_room(skeleton, names, checkpoint.files))
        return {
            f"{name}.{s}" for pair in places.items() for name in pair for s in scheme.form.parts
        }

    model = load_model(checkpoint, prepare)
    for name in names:
        weight, layer = read_layer(checkpoint, name, scheme).to(device), scheme.layer(name)
        fill(model, places[name], name, weight, layer.abits if layer else None)
    return model.to(device)


def quantized_layers(checkpoint: Checkpoint) -> list[str]:
    """The names on disk of the quantized layers. Raises :class:`ModelError` if parts lack."""
    form = _scheme(checkpoint).form
    names: dict[str, None] = {}
    for part in checkpoint.files:
        name, _, suffix = part.rpartition(".")
        if suffix in form.parts and suffix != "weight":  # which any module has
            names[name] = None
    if not names:
        raise ModelError(
            f"config.json says {form.name}, and no layer of {checkpoint.folder} is packed", TOGETHER
        )
    for name in names:
        for suffix in form.suffixes:
            if f"{name}.{suffix}" not in checkpoint.files:
                raise ModelError(
                    f"{checkpoint.folder} lacks {name}.{suffix}", "copy the model again"
                )
        if f"{name}.weight" in checkpoint.files and "weight" not in form.parts:
            raise ModelError(
                f"{checkpoint.folder} has {name}.weight beside its codes", "copy the model again"
            )
    return list(names)


def packed_tensors(checkpoint: Checkpoint) -> list[str]:
    """The names of all tensors that the quantized layers are kept in."""
    form, names = _scheme(checkpoint).form, quantized_layers(checkpoint)
    return [part for name in names for part in _parts(checkpoint, name, form)]


def read_layer(
    checkpoint: Checkpoint, name: str, scheme: Detected | None = None
) -> QuantizedWeight:
    """One quantized layer by its name on disk."""
    scheme = scheme or _scheme(checkpoint)
    layer = scheme.layer(name)
    if layer is None:
        raise ModelError(f"{name} is packed, and config.json says that it is not", TOGETHER)
    wanted = _parts(checkpoint, name, scheme.form)
    tensors = {key.rpartition(".")[2]: value for key, value in checkpoint.tensors(wanted)}
    weight = scheme.form.decode(name, tensors, layer)
    if not torch.isfinite(weight.scales).all():
        raise ModelError(f"the scales of {name} hold NaN or infinity", "copy the model again")
    return weight


def _scheme(checkpoint: Checkpoint) -> Detected:
    scheme = detect(checkpoint)
    if scheme is None:
        raise ModelError(f"{checkpoint.folder} is not quantized", "give what optq quantize wrote")
    return scheme


def _parts(checkpoint: Checkpoint, name: str, form: Format) -> list[str]:
    parts = [f"{name}.{suffix}" for suffix in form.parts]
    return [part for part in parts if part in checkpoint.files]
