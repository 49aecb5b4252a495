"""A checkpoint whose weights are codes, seen as the plain one that they stand for.

DeepSeek, Qwen, Mistral, GPT-OSS and others publish in fp8 or MXFP4. transformers' own operations
make a weight of its codes and scales; here they are run on one tensor at a time, when somebody asks
for it. Names, shapes and dtypes are those of the plain checkpoint, so nobody else need know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from optq.boundary import library
from optq.errors import ModelError
from optq.model.checkpoint import Checkpoint
from optq.model.source import quiet

Parts = dict[str, str]  # a tensor's name on disk, by what the operation calls it
FLOAT8 = ("float-quantized", "naive-quantized")  # of compressed-tensors' formats


@dataclass(frozen=True, kw_only=True)
class Dequantized(Checkpoint):
    """``source`` without its codes; ``parts`` says of what each weight ``into`` a dtype is made."""

    source: Checkpoint
    into: torch.dtype
    parts: dict[str, Parts]
    make: Callable[[str, dict[str, Tensor]], Tensor]

    def config(self) -> dict[str, Any]:
        """The source's, as of a plain model."""
        config = super().config()
        return {key: value for key, value in config.items() if key != "quantization_config"}

    def tensors(self, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """As of any checkpoint; each weight is made when its turn comes, and not kept."""
        wanted = sorted(self.files if names is None else names, key=self.files.__getitem__)
        for made, some in groupby(wanted, key=self.own):
            if not made:
                yield from super().tensors(list(some))
                continue
            for name in some:
                parts = dict(self.source.tensors([*self.parts[name].values()]))
                with library(ModelError, f"{name} cannot be dequantized", "copy the model again"):
                    weight = self._made(name, parts)
                yield name, weight

    def own(self, name: str) -> bool:
        return name in self.parts

    def _made(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        parts = {part: tensors[on_disk] for part, on_disk in self.parts[name].items()}
        return self.make(name.rpartition(".")[2], parts)


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a plain one, if transformers dequantizes its weights; else as it is.

    Weights get the dtype that the model is run in: the config's, or bfloat16. Raises
    :class:`ModelError` where transformers cannot read the settings.
    """
    settings = checkpoint.config().get("quantization_config")
    if not isinstance(settings, dict) or not _is_low_float(settings):
        return checkpoint
    from transformers.quantizers import AutoHfQuantizer

    method = settings["quant_method"]
    remedy = "check its quantization_config"
    if method == "compressed-tensors":
        remedy = "run `pip install compressed-tensors`, whose code dequantizes it, or " + remedy
    with quiet(), library(ModelError, f"the settings of {method} cannot be read", remedy):
        quantizer = AutoHfQuantizer.from_config(settings | {"dequantize": True})
    config = checkpoint.config()
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    dtype = torch.bfloat16
    if isinstance(named, torch.dtype) and named.itemsize > 1:
        dtype = named
    parts, left_out = _parts(checkpoint, quantizer.serialized_names)
    make = _maker(quantizer, settings.get("weight_block_size"), dtype)
    files = {name: file for name, file in checkpoint.files.items() if name not in left_out}
    layout = {name: checkpoint.layout[name] for name in files}
    alike: dict[Any, Tensor] = {}  # the operation tells the shape, once for all of one kind
    for name, own in parts.items():
        tensors = {part: checkpoint.layout[on_disk] for part, on_disk in own.items()}
        parameter = name.rpartition(".")[2]
        kind = (parameter, *((part, t.shape, t.dtype) for part, t in tensors.items()))
        if kind not in alike:
            with library(ModelError, f"{name} cannot be dequantized", "copy the model again"):
                alike[kind] = make(parameter, tensors)
        files[name] = checkpoint.files[next(iter(own.values()))]
        layout[name] = alike[kind]
    say = checkpoint.dtype or (dtype if named is not dtype else None)
    around = {
        "hub": checkpoint.hub,
        "whole": checkpoint.whole,
        "source": checkpoint,
        "into": dtype,
        "parts": parts,
        "make": make,
    }
    return Dequantized(checkpoint.folder, files, layout, say, **around)  # type: ignore[arg-type]


def _is_low_float(settings: dict[str, Any]) -> bool:
    """Whether these are fp8 or MXFP4 weights, and no others.

    compressed-tensors has codes of other kinds under the same name.
    """
    if settings.get("quant_method") != "compressed-tensors":
        return settings.get("quant_method") in ("fp8", "mxfp4")
    groups = settings.get("config_groups")
    groups = [*groups.values()] if isinstance(groups, dict) else [None]
    for group in groups:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type") != "float":
            return False
        if (group.get("format") or settings.get("format")) not in FLOAT8:
            return False
    return True


def _parts(
    checkpoint: Checkpoint, serialized: dict[str, list[str]]
) -> tuple[dict[str, Parts], set[str]]:
    """The parts of each weight that is codes, and all names on disk that go with codes.

    ``serialized`` are transformers' names: the codes, their scales, and what there may be more.
    """
    found: dict[str, Parts] = {}
    left_out: set[str] = set()
    scales: dict[str, list[str]] = {}
    for name in checkpoint.files:
        module, _, suffix = name.rpartition(".")
        if "scale" in suffix or "zero_point" in suffix:
            scales.setdefault(module, []).append(name)
    for parameter, (codes, scale, *more) in serialized.items():
        for name, layout in checkpoint.layout.items():
            module, _, suffix = name.rpartition(".")
            if suffix != codes or f"{module}.{scale}" not in checkpoint.files:
                continue
            if layout.itemsize > 1 or layout.is_floating_point() != (codes == parameter):
                continue
            parts = {part: f"{module}.{part}" for part in (codes, scale, *more)}
            parts = {part: own for part, own in parts.items() if own in checkpoint.files}
            found[f"{module}.{parameter}"] = parts
            left_out.update(parts.values())
            if codes == parameter:  # those of its activations as well
                left_out.update(scales[module])
    return found, left_out


def _maker(
    quantizer: Any, block: list[int] | None, dtype: torch.dtype
) -> Callable[[str, dict[str, Tensor]], Tensor]:
    """What makes a weight of its parts, by transformers' operation."""
    operation = quantizer.get_load_operations()["dequantize"](quantizer)

    @cache
    def holder(parameter: str) -> nn.Module:
        """A module with the parameter, whose dtype the operation takes."""
        module = nn.Module()
        empty = torch.empty(0, dtype=dtype, device="meta")
        module.register_parameter(parameter, nn.Parameter(empty, requires_grad=False))
        return module

    @torch.no_grad()
    def make(parameter: str, parts: dict[str, Tensor]) -> Tensor:
        shape = None
        if block and "weight_scale_inv" in parts:
            parts, shape = _whole_blocks(parts, block), parts["weight"].shape
        made = operation.convert(
            parts,
            source_patterns=[*parts],
            target_patterns=[parameter],
            full_layer_name=parameter,
            model=holder(parameter),
        )
        weight = made[parameter].detach()
        if shape is not None and weight.shape != shape:
            weight = weight[..., : shape[-2], : shape[-1]].contiguous()
        return weight

    return make


def _whole_blocks(parts: dict[str, Tensor], block: list[int]) -> dict[str, Tensor]:
    """The codes filled up to whole blocks, where their last blocks are smaller than the others.

    transformers takes all blocks for equal: it refuses DeepSeek's 576 rows in blocks of 128, and
    would cut 192 into two of 96.
    """
    codes, scales = parts["weight"], parts["weight_scale_inv"]
    if codes.ndim != 2 or scales.ndim != 2:
        return parts
    more = [n * each - size for n, each, size in zip(scales.shape, block, codes.shape, strict=True)]
    if not any(more) or not all(0 <= m < each for m, each in zip(more, block, strict=True)):
        return parts
    whole = codes.new_zeros(scales.shape[0] * block[0], scales.shape[1] * block[1])
    whole[: codes.shape[0], : codes.shape[1]] = codes
    return parts | {"weight": whole}
