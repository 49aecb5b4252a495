"""``compressed-tensors``, ``pack-quantized``: what llm-compressor writes and vLLM reads.

For a layer ``X`` with codes ``c [N, K]`` and grids ``s, z [N, G]``, instead of ``X.weight``:

    X.weight_packed      int32          [N, ceil(K * b / 32)]   codes, packed along the K axis
    X.weight_scale       model's dtype  [N, G]
    X.weight_shape       int64          [2]                     N and K
    X.weight_zero_point  int32          [ceil(N * b / 32), G]   packed along N, if asymmetric
    X.weight_g_idx       int            [K]                     old files with act-order groups only

The format speaks of signed codes ``c - 2^(b-1)`` and signed zero points, and stores each with
``2^(b-1)`` added: the stored fields are our unsigned ``c`` and ``z``. Packing is
:mod:`optq.core.packing`; a last word that is not full ends in zeros. Groups are consecutive
columns: releases since 0.18 know no ``weight_g_idx``, so it is read and never written. A mixed
checkpoint targets its layers by name, not by expressions: vLLM can translate names into its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optq.core.packing import pack, unpack
from optq.core.weight import LayerScheme, QuantizedWeight, group_index
from optq.errors import ModelError, SettingError
from optq.formats.config_groups import (
    HEAD,
    INTEGERS,
    PACKED,
    groups_of,
    matches,
    patterns_in,
    refuse_other_kinds,
    scheme_of,
)
from optq.formats.scheme import (
    SCALES,
    Detected,
    Format,
    Schemes,
    dense_experts,
    has_drafts,
    heads_of,
    require_fit,
    require_groups,
)
from optq.model.checkpoint import TOGETHER

COMPRESSED = "compressed-tensors"
RELEASE = "0.20.0"  # of the package compressed-tensors whose layout this is


@dataclass(frozen=True)
class CompressedTensorsFormat(Format):
    """The one layout of compressed-tensors that holds integer codes of 2, 3, 4 or 8 bits."""

    name: str = COMPRESSED
    suffixes: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
    optional: tuple[str, ...] = ("weight_zero_point", "weight_g_idx")
    kind: str = PACKED  # what the config calls it
    other: str = INTEGERS  # which is not read here

    def check(
        self, name: str, rows: int, columns: int, layer: LayerScheme, conv1d: bool = False
    ) -> None:
        if conv1d:  # loaded by transformers, it would be random, with no more than a report
            raise SettingError(
                f"{name} is a Conv1D, which readers of {self.name} do not know",
                "write --format gptq",
            )
        super().check(name, rows, columns, layer, conv1d)
        if layer.actorder:
            raise SettingError(
                f"the groups of {name} would follow act-order: {self.name} has no tensor for that",
                "add static groups (--static-groups), or write --format gptq",
            )

    def encode(self, layer: QuantizedWeight, dtype: torch.dtype, sym: bool) -> dict[str, Tensor]:
        # Zero points are written where the config will say that there are some, even if all of
        # them happen to be the middle.
        groupsize = -1 if layer.groups == 1 else layer.width
        scheme = LayerScheme(layer.wbits, groupsize, sym, not layer.consecutive)
        self.check("the layer", layer.rows, layer.cols, scheme)
        dtype = scale_dtype(dtype)
        tensors = {
            "weight_packed": _pack(layer.codes, layer.wbits),
            "weight_scale": layer.scales.to(dtype).contiguous(),
            "weight_shape": torch.tensor([layer.rows, layer.cols]),
        }
        if not scheme.sym:
            tensors["weight_zero_point"] = _pack(layer.zeros.T, layer.wbits).T.contiguous()
        if not torch.equal(self.decode("", tensors, scheme).weight, layer.weight.float()):
            raise SettingError(
                f"{self.name} keeps scales in {dtype}, which cannot hold those of this model",
                "write gptq or gptq_v2, whose scales are float16",
            )
        return {suffix: tensor.cpu() for suffix, tensor in tensors.items()}

    def layout(
        self, rows: int, columns: int, layer: LayerScheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        groups = 1 if layer.groupsize == -1 else -(-columns // layer.groupsize)
        words = torch.empty(rows, _words(columns, layer.wbits), dtype=torch.int32, device="meta")
        tensors = {
            "weight_packed": words,
            "weight_scale": words.new_empty(rows, groups, dtype=scale_dtype(dtype)),
            "weight_shape": words.new_empty(2, dtype=torch.int64),
        }
        zeros = words.new_empty(_words(rows, layer.wbits), groups)
        return tensors if layer.sym else tensors | {"weight_zero_point": zeros}

    def decode(self, name: str, tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
        rows, columns = _shape(name, tensors["weight_shape"])
        groupsize = columns if layer.groupsize == -1 else layer.groupsize
        if columns % groupsize:
            raise ModelError(f"{name} has {columns} columns in groups of {groupsize}", TOGETHER)
        groups = columns // groupsize
        for suffix, needed in zip(self.optional, (not layer.sym, layer.actorder), strict=True):
            if needed and suffix not in tensors:
                raise ModelError(f"{name} has no {suffix}, which its config asks for", TOGETHER)
            if suffix in tensors and not needed:
                raise ModelError(f"{name} has a {suffix}, which its config denies", TOGETHER)
        fitting = {
            "weight_packed": ((rows, _words(columns, layer.wbits)), (torch.int32,)),
            "weight_scale": ((rows, groups), SCALES),
            "weight_zero_point": ((_words(rows, layer.wbits), groups), (torch.int32,)),
            "weight_g_idx": ((columns,), (torch.int32, torch.int64)),
        }
        what = f"{rows} rows, {columns} columns, {layer.wbits} bits and groups of {groupsize}"
        require_fit(name, tensors, fitting, what)
        scales = tensors["weight_scale"].float()
        if layer.sym:
            zeros = torch.full_like(scales, 2 ** (layer.wbits - 1), dtype=torch.uint8)
        else:
            zeros = _unpack(tensors["weight_zero_point"].T, rows, layer.wbits).T.contiguous()
        in_order = group_index(columns, groupsize, scales.device)
        g_idx = tensors.get("weight_g_idx", in_order)
        if bool((g_idx == -1).any()):  # what the package left where no act-order was run
            g_idx = in_order
        require_groups(f"{name}.weight_g_idx", g_idx, groups)
        codes = _unpack(tensors["weight_packed"], columns, layer.wbits)
        return QuantizedWeight(layer.wbits, codes, scales, zeros, g_idx.to(torch.int32))

    def config(
        self, layers: Schemes, dense: list[str], percdamp: float, outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The ``quantization_config``; the format has no field for ``percdamp``.

        Readers give every ``Linear`` of the model packed tensors unless ``ignore`` names it;
        ``lm_head`` is named in any case, there or as a target, whatever the disk calls it: vLLM's
        and SGLang's is no ``Linear``. Of experts vLLM asks for three names of the first, also where
        the disk has others. SGLang wants a pattern for multi-token layers.
        """
        places = dict.fromkeys(dense_experts(layers, [*dense, *outside]).values())
        asked = [f"{place}.0.{part}_proj" for place in places for part in ("gate", "up", "down")]
        head = [] if heads_of(layers) else [HEAD]
        every = dict.fromkeys([*dense, *outside, *asked, *head])
        ignore = [name for name in every if name not in layers]
        if has_drafts(layers, outside) and not any("mtp" in name for name in layers):
            ignore.append("re:.*mtp.*")
        return {
            "quant_method": COMPRESSED,
            "format": self.kind,
            "quantization_status": "compressed",
            "version": RELEASE,
            "ignore": ignore,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "config_groups": groups_of(layers),
        }

    def detect(self, settings: dict[str, Any]) -> Detected | None:
        if settings.get("quant_method") != COMPRESSED or settings.get("format") == self.other:
            return None
        refuse_other_kinds(settings, self.kind)
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ModelError("the quantization_config has no config_groups", TOGETHER)
        schemes: dict[str, LayerScheme] = {}
        for title, group in groups.items():
            layer = scheme_of(title, group, self.kind)
            targets = patterns_in(f"the targets of {title}", group.get("targets"))
            schemes |= dict.fromkeys(targets, layer)
        ignore = patterns_in("ignore", settings.get("ignore") or [])
        # As match_targets of the package: names, then expressions, then the class.
        order = sorted(schemes, key=lambda target: (target == "Linear", "re:" in target, target))

        def layer_of(name: str) -> LayerScheme | None:
            if any(matches(pattern, name) for pattern in ignore):
                return None
            return next((schemes[target] for target in order if matches(target, name)), None)

        return Detected(self, layer_of)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype  # the widest that readers know


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _pack(values: Tensor, bits: int) -> Tensor:
    """Each row of ``[rows, count]`` as words ``[rows, ceil(count * bits / 32)]``."""
    rows, count = values.shape
    padded = values.new_zeros(-(-count // 32) * 32, rows)  # 32 values fill whole words
    padded[:count] = values.T
    return pack(padded, bits)[: _words(count, bits)].T.contiguous()


def _unpack(words: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    padded = words.new_zeros(-(-count // 32) * bits, len(words))
    padded[: words.shape[1]] = words.T
    return unpack(padded, bits)[:count].T.contiguous()


def _shape(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.is_floating_point() or tensor.shape != (2,) or tensor.min() < 1:
        raise ModelError(f"{name}.weight_shape is {tensor.tolist()}, no rows and columns", TOGETHER)
    rows, columns = tensor.tolist()
    return rows, columns


COMPRESSED_TENSORS = CompressedTensorsFormat()
