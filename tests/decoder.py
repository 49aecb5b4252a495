"""A reader of ``gptq`` and ``gptq_v2`` checkpoints that shares no code with the writer.

Written from the description of the format alone, strict where a tolerant reader would guess, and
in terms of the bit stream itself: value ``i`` is stream bits ``i*b .. i*b + b - 1``, least
significant first, and word ``w`` is stream bits ``32w .. 32w + 31``.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass
class Layer:
    """One decoded layer: ``W[n, k] = s[n, g] * (q[n, k] - z[n, g])`` with ``g = g_idx[k]``."""

    weight: np.ndarray  # [N, K] float64
    codes: np.ndarray  # [N, K]
    zeros: np.ndarray  # [N, G]
    scales: np.ndarray  # [N, G] float64
    g_idx: np.ndarray  # [K]


def stream_values(words, bits):
    """``[streams, values]`` out of int32 ``[streams, words]``, each row one bit stream."""
    words = np.ascontiguousarray(words)
    if words.dtype != np.int32:
        raise ValueError(f"packed words are {words.dtype}, not int32")
    if words.shape[1] * 32 % bits:
        raise ValueError(f"{words.shape[1]} words do not hold a whole number of {bits}-bit values")
    stream = np.unpackbits(words.astype("<i4").view(np.uint8), axis=1, bitorder="little")
    fields = stream.reshape(len(words), -1, bits).astype(np.int64)
    return fields @ (2 ** np.arange(bits))


def decode_layer(qweight, qzeros, scales, g_idx, bits, version):
    """One layer from its four arrays; ``version`` is 1 (``gptq``) or 2 (``gptq_v2``)."""
    codes = stream_values(qweight.T, bits)
    zeros = stream_values(qzeros, bits).T + {1: 1, 2: 0}[version]
    outputs, inputs = codes.shape
    groups = scales.shape[0]
    if scales.dtype != np.float16 or g_idx.dtype != np.int32:
        raise ValueError(f"scales are {scales.dtype}, g_idx {g_idx.dtype}")
    if scales.shape != (groups, outputs) or zeros.shape != (outputs, groups):
        raise ValueError(f"scales {scales.shape}, zeros {zeros.shape}, {outputs} outputs")
    if g_idx.shape != (inputs,) or g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"g_idx {g_idx.shape} for {inputs} inputs and {groups} groups")
    if zeros.max() > 2**bits - 1:
        raise ValueError("a zero point of 0 was stored in version 1, which cannot hold it")
    steps = scales.T.astype(np.float64)
    weight = steps[:, g_idx] * (codes - zeros[:, g_idx])
    return Layer(weight, codes, zeros, steps, g_idx)


def tensor_files(folder):
    """``{tensor name: file}`` of a folder with one safetensors file, or many and an index."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in named.items()}
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="numpy") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def bits_of(module, config):
    """A module's bits: the checkpoint's, unless a ``+:`` rule of ``dynamic`` says otherwise."""
    for rule, changes in (config.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("-:").removeprefix("+:"), module):
            if rule.startswith("-:"):
                raise ValueError(f"{module} is quantized, but {rule} says that it is dense")
            return changes.get("bits", config["bits"])
    return config["bits"]


def decode_folder(folder):
    """``{module: Layer}`` of every quantized layer of a checkpoint."""
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    if config["quant_method"] != "gptq" or config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"not a checkpoint of this format: {config}")
    version = {"gptq": 1, "gptq_v2": 2}[config["checkpoint_format"]]
    files = tensor_files(folder)
    modules = [name.removesuffix(".qweight") for name in files if name.endswith(".qweight")]
    layers = {}
    for module in modules:
        if f"{module}.weight" in files:
            raise ValueError(f"{module} is there twice, dense and quantized")
        arrays = []
        for part in PARTS:
            name = f"{module}.{part}"
            with safe_open(files[name], framework="numpy") as tensors:
                arrays.append(tensors.get_tensor(name))
        layer = decode_layer(*arrays, bits_of(module, config), version)
        size, inputs = config["group_size"], len(layer.g_idx)
        groups = 1 if size == -1 else -(-inputs // size)
        if layer.scales.shape[1] != groups:
            raise ValueError(f"{module} has {layer.scales.shape[1]} groups, not {groups}")
        in_order = np.arange(inputs) // (inputs if size == -1 else size)
        if not config["desc_act"] and not np.array_equal(layer.g_idx, in_order):
            raise ValueError(f"{module}: g_idx is not k // {size}, and desc_act does not say so")
        layers[module] = layer
    return layers


def decode(folder):
    """``{module: W [N, K] float64}`` of every quantized layer of a checkpoint."""
    return {module: layer.weight for module, layer in decode_folder(folder).items()}
