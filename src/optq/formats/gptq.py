"""``gptq`` and ``gptq_v2``: what AutoGPTQ began and GPTQModel, transformers and SGLang read.

For a layer ``X`` with codes ``c [N, K]`` and grids ``s, z [N, G]``, instead of ``X.weight``:

    X.qweight  int32    [K * b / 32, N]   codes, packed down the K axis
    X.qzeros   int32    [G, N * b / 32]   zero points, packed along the N axis
    X.scales   float16  [G, N]
    X.g_idx    int32    [K]               the group of each column

Version 1 stores ``z - 1``, so it cannot hold ``z = 0``; ``gptq_v2`` stores ``z``. Packing is
:mod:`optq.core.packing`. A group must be whole, and every word full.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from optq import __version__
from optq.core.grid import BITS, Storage
from optq.core.packing import pack, unpack
from optq.core.weight import LayerScheme, QuantizedWeight
from optq.errors import ModelError, SettingError
from optq.formats.scheme import (
    EXPERT,
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

DOTTED = "{}.{}".format


@dataclass(frozen=True)
class GPTQFormat(Format):
    """One version of the format; ``zero_offset`` is what it subtracts from a zero point."""

    name: str
    zero_offset: int
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    settings_file: str | None = "quantize_config.json"

    def storage(self, dtype: torch.dtype) -> Storage:
        return replace(super().storage(dtype), min_zero=self.zero_offset)

    def check(
        self, name: str, rows: int, columns: int, layer: LayerScheme, conv1d: bool = False
    ) -> None:
        super().check(name, rows, columns, layer, conv1d)
        for what, count in (("columns", columns), ("rows", rows)):
            if count * layer.wbits % 32:
                raise SettingError(
                    f"{name} cannot be packed at {layer.wbits} bits: {count} {what} do not fill"
                    " 32-bit words",
                    "write --format compressed-tensors, whose last word may be part full",
                )

    def encode(self, layer: QuantizedWeight, dtype: torch.dtype, sym: bool) -> dict[str, Tensor]:
        zeros = layer.zeros.to(torch.int64) - self.zero_offset
        if zeros.min() < 0:
            raise SettingError(f"{self.name} cannot hold a zero point of 0", "write gptq_v2")
        codes = layer.codes.T.contiguous()
        tensors = {
            "qweight": pack(codes, layer.wbits),
            "qzeros": pack(zeros, layer.wbits).T.contiguous(),
            "scales": layer.scales.T.to(torch.float16).contiguous(),
            "g_idx": layer.g_idx.to(torch.int32, copy=True),  # layers of a site share theirs
        }
        held = self._decode(tensors, layer.wbits)
        pairs = [(held.codes.T, codes), (held.scales, layer.scales), (held.zeros, layer.zeros)]
        pairs.append((held.g_idx, layer.g_idx))
        if not all(torch.equal(one, other) for one, other in pairs):
            raise SettingError(
                f"{self.name} cannot hold a scale that float16 does not", "write compressed-tensors"
            )
        return {suffix: tensor.cpu() for suffix, tensor in tensors.items()}

    def layout(
        self, rows: int, columns: int, layer: LayerScheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        groups = 1 if layer.groupsize == -1 else -(-columns // layer.groupsize)
        words = torch.empty(columns * layer.wbits // 32, rows, dtype=torch.int32, device="meta")
        return {
            "qweight": words,
            "qzeros": words.new_empty(groups, rows * layer.wbits // 32),
            "scales": words.new_empty(groups, rows, dtype=torch.float16),
            "g_idx": words.new_empty(columns),
        }

    def decode(self, name: str, tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
        bits, codes = layer.wbits, tensors["qweight"]
        if codes.ndim != 2:
            raise ModelError(
                f"{name}.qweight is {list(codes.shape)} where int32 with 2 axes belongs", TOGETHER
            )
        words, rows = codes.shape
        columns = words * 32 // bits
        groups = 1 if layer.groupsize == -1 else -(-columns // layer.groupsize)
        fitting = {
            "qweight": ((words, rows), (torch.int32,)),
            "qzeros": ((groups, rows * bits // 32), (torch.int32,)),
            "scales": ((groups, rows), SCALES),
            "g_idx": ((columns,), (torch.int32,)),
        }
        require_fit(name, tensors, fitting, f"{bits} bits and groups of {layer.groupsize}")
        require_groups(f"{name}.g_idx", tensors["g_idx"], groups)
        return self._decode(tensors, bits)

    def _decode(self, tensors: dict[str, Tensor], bits: int) -> QuantizedWeight:
        zeros = unpack(tensors["qzeros"].T.contiguous(), bits)
        return QuantizedWeight(
            wbits=bits,
            codes=unpack(tensors["qweight"], bits).T,
            scales=tensors["scales"].T.float(),
            zeros=(zeros + self.zero_offset) & (2**bits - 1),
            g_idx=tensors["g_idx"],
        )

    def config(
        self, layers: Schemes, dense: list[str], percdamp: float, outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The ``quantization_config``: the commonest scheme, and a rule for each other one.

        All dense experts of a block have one: vLLM asks for the name that they have together.
        Outside, a rule covers all that lies below the first name with nothing packed in it
        (``mtp``, ``model.layers.61``): readers fuse layers, and then look for other names. vLLM
        leaves layers for multi-token prediction dense only where a rule says ``mtp``.
        """
        base, heads = Counter(layers.values()).most_common(1)[0][0], heads_of(layers)
        config: dict[str, Any] = {
            **_settings(base),
            "lm_head": bool(heads),  # whatever its name
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "damp_percent": percdamp,
            "true_sequential": True,
            "meta": {"quantizer": [f"optq:{__version__}"]},
        }
        experts = dense_experts(layers, dense)
        rules: dict[str, Any] = {}
        for name in dense:
            place = experts.get(name)
            rules[rf"-:^{re.escape(place)}(\.|$)" if place else f"-:^{re.escape(name)}$"] = {}
        packed = {above for name in layers for above in accumulate(name.split("."), DOTTED)}
        for name in outside:
            if not name.endswith("lm_head"):  # which has a key of its own
                above = accumulate(name.split("."), DOTTED)
                whole = next((place for place in above if place not in packed), name)
                rules[rf"-:^{re.escape(whole)}(\.|$)"] = {}
        if has_drafts(layers, outside) and not any("mtp" in name for name in (*layers, *rules)):
            rules["-:.*mtp.*"] = {}
        for layer, patterns in _others(layers, base).items():
            every = patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"
            rules[f"+:^{every}$"] = _settings(layer)
        if any(rule.startswith("-:") for rule in rules):
            places = [name for name in layers if name not in heads]
            inside = {re.sub(r"^.*?\.\d+\.", "", name, count=1): None for name in places}
            config["modules_in_block_to_quantize"] = [[name] for name in inside]
        if rules:
            config["dynamic"] = rules
        return config

    def detect(self, settings: dict[str, Any]) -> Detected | None:
        if settings.get("quant_method") != "gptq":
            return None
        name = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if name not in ("gptq", "gptq_v2"):
            raise ModelError(f"the checkpoint format {name} is unknown", "write gptq or gptq_v2")
        if name != self.name:
            return None
        if settings.get("pack_dtype", "int32") != "int32":
            raise ModelError(
                f"the codes are packed in {settings['pack_dtype']}", "pack them in int32 words"
            )
        base, changes_of = _scheme(settings), settings.get("dynamic") or {}
        if not isinstance(changes_of, dict) or not all(
            isinstance(changes, dict) for changes in changes_of.values()
        ):
            raise ModelError("the dynamic rules are no rules", "copy config.json again")
        try:
            rules = [
                (rule[:2], re.compile(rule.removeprefix("-:").removeprefix("+:")), changes)
                for rule, changes in changes_of.items()
            ]
        except re.error as error:
            cause = f"a dynamic rule is no regular expression: {error}"
            raise ModelError(cause, TOGETHER) from error

        def layer(name: str) -> LayerScheme | None:
            """The first rule that matches decides, as in GPTQModel."""
            for sign, pattern, changes in rules:
                if pattern.match(name):
                    return None if sign == "-:" else _scheme(settings | changes)
            return base

        return Detected(self, layer)


def _others(layers: Schemes, base: LayerScheme) -> dict[LayerScheme, list[str]]:
    """What matches the layers of each scheme but ``base``, without its ends.

    vLLM asks for the names of what it fuses, ``qkv_proj`` and all ``experts``: where several layers
    of a module are alike, their pattern matches all names in it but those of the others.
    """
    inside: dict[str, dict[str, LayerScheme]] = {}
    for name, layer in layers.items():
        experts = EXPERT.fullmatch(name)
        place, _, own = (experts[1] if experts else name).rpartition(".")
        inside.setdefault(place, {})[own] = layer
    found: dict[LayerScheme, list[str]] = {}
    for place, members in inside.items():
        for layer in dict.fromkeys(members.values()):
            alike = [own for own, other in members.items() if other == layer]
            if layer == base:
                continue
            pattern = re.escape(alike[0])
            if len(alike) > 1:
                rest = "|".join(re.escape(own) for own in members if own not in alike)
                pattern = (f"(?!(?:{rest})$)" if rest else "") + r"[^.]+"
            if "experts" in alike:  # of which all have one width, whatever stands beside them
                pattern += r"(?:\..+)?"
            found.setdefault(layer, []).append(
                f"{re.escape(place)}\\.{pattern}" if place else pattern
            )
    return found


def _settings(layer: LayerScheme) -> dict[str, Any]:
    return {
        "bits": layer.wbits,
        "group_size": layer.groupsize,
        "desc_act": layer.actorder,
        "sym": layer.sym,
    }


def _scheme(settings: dict[str, Any]) -> LayerScheme:
    bits, groupsize = settings.get("bits"), settings.get("group_size", -1)
    if type(bits) is not int or bits not in BITS:
        raise ModelError(f"the checkpoint says it has {bits} bits", "give one of 2, 3, 4 or 8 bits")
    if not isinstance(groupsize, int) or (groupsize < 1 and groupsize != -1):
        raise ModelError(f"the checkpoint says it has groups of {groupsize}", TOGETHER)
    sym, actorder = bool(settings.get("sym", True)), bool(settings.get("desc_act", False))
    return LayerScheme(bits, groupsize, sym, actorder)


GPTQ_V1 = GPTQFormat("gptq", zero_offset=1)
GPTQ_V2 = GPTQFormat("gptq_v2", zero_offset=0)
