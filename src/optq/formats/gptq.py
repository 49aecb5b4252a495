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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optq import __version__
from optq.core.grid import BITS, Storage
from optq.core.packing import pack, unpack
from optq.core.solution import Solution, dequantize
from optq.errors import ModelError, SettingError

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class PackedLayer:
    """One layer as a file holds it: ``codes [N, K]``, grids ``[N, G]``, ``g_idx [K]``."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def weight(self) -> Tensor:
        """The dequantized weights ``[N, K]``, float32."""
        return dequantize(self.codes, self.scales.float(), self.zeros, self.g_idx)


@dataclass(frozen=True)
class GPTQFormat:
    """One version of the format; ``zero_offset`` is what it subtracts from a zero point."""

    name: str
    zero_offset: int

    def storage(self, dtype: torch.dtype) -> Storage:
        """What survives in a file for a model of ``dtype``.

        Readers turn the float16 scales into the model's dtype: for bfloat16 both must be exact.
        """
        both = (torch.bfloat16, torch.float16)
        return Storage(both if dtype == torch.bfloat16 else (torch.float16,), self.zero_offset)

    def check(self, name: str, rows: int, columns: int, wbits: int, groupsize: int) -> None:
        """Refuse a layer that this format cannot hold, before any work is done."""
        if groupsize != -1 and columns % groupsize:
            raise SettingError(
                f"groupsize {groupsize} does not divide the {columns} columns of {name}",
                f"choose {', '.join(_divisors(columns))} or -1, or --skip this layer",
            )
        for what, count in (("columns", columns), ("rows", rows)):
            if count * wbits % 32:
                raise SettingError(
                    f"{name} cannot be packed at {wbits} bits: {count} {what} do not fill"
                    " 32-bit words",
                    "leave this layer dense (--skip), or choose other bits",
                )

    def encode(self, layer: Solution) -> dict[str, Tensor]:
        """The tensors of a solved layer by suffix, in main memory; they decode to its weights."""
        zeros = layer.zeros.to(torch.int64) - self.zero_offset
        if zeros.min() < 0:
            raise SettingError(f"{self.name} cannot hold a zero point of 0", "write gptq_v2")
        tensors = {
            "qweight": pack(layer.codes.T, layer.wbits).contiguous(),
            "qzeros": pack(zeros, layer.wbits).T.contiguous(),
            "scales": layer.scales.T.to(torch.float16).contiguous(),
            "g_idx": layer.g_idx.to(torch.int32, copy=True),  # layers of a site share theirs
        }
        if not torch.equal(self.decode(tensors, layer.wbits).weight(), layer.weight.float()):
            raise AssertionError("the encoded layer does not decode to the solved weights")
        return {suffix: tensor.cpu() for suffix, tensor in tensors.items()}

    def decode(self, tensors: dict[str, Tensor], bits: int) -> PackedLayer:
        """The inverse of :meth:`encode`."""
        mask = 2**bits - 1
        zeros = unpack(tensors["qzeros"].T.contiguous(), bits).to(torch.int64)
        return PackedLayer(
            codes=unpack(tensors["qweight"], bits).T.contiguous(),
            scales=tensors["scales"].T,
            zeros=((zeros + self.zero_offset) & mask).to(torch.uint8),
            g_idx=tensors["g_idx"],
        )

    def check_parts(self, name: str, tensors: dict[str, Tensor], bits: int) -> None:
        """Refuse tensors of a layer that do not fit each other. Raises :class:`ModelError`."""
        words, rows = tensors["qweight"].shape
        groups = len(tensors["scales"])
        columns = words * 32 // bits
        wanted = {
            "scales": (groups, rows),
            "qzeros": (groups, rows * bits // 32),
            "g_idx": (columns,),
        }
        for suffix, shape in wanted.items():
            if tuple(tensors[suffix].shape) != shape:
                raise ModelError(
                    f"{name}.{suffix} is {list(tensors[suffix].shape)} where {list(shape)} fits"
                    f" {bits} bits",
                    "check that config.json and the weights belong together",
                )
        g_idx = tensors["g_idx"]
        if g_idx.min() < 0 or g_idx.max() >= groups:
            raise ModelError(
                f"{name}.g_idx names groups outside 0 .. {groups - 1}", "copy the model again"
            )

    def config(self, quantizer: Any, layers: list[str], dense: list[str]) -> dict[str, Any]:
        """The ``quantization_config``; ``layers`` and ``dense`` are names on disk."""
        desc_act = getattr(quantizer, "actorder", False)
        static = getattr(quantizer, "static_groups", False) or quantizer.groupsize == -1
        config: dict[str, Any] = {
            "bits": quantizer.wbits,
            "group_size": quantizer.groupsize,
            "desc_act": desc_act and not static,
            "sym": quantizer.sym,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "damp_percent": getattr(quantizer, "percdamp", 0.0),
            "true_sequential": True,
            "meta": {"quantizer": [f"optq:{__version__}"]},
        }
        if dense:
            inside = {re.sub(r"^.*?\.\d+\.", "", name, count=1): None for name in layers}
            config["modules_in_block_to_quantize"] = [[name] for name in inside]
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in dense}
        return config


def _divisors(columns: int) -> list[str]:
    return [str(size) for size in (256, 128, 64, 32, 16) if columns % size == 0]


GPTQ_V1 = GPTQFormat("gptq", zero_offset=1)
GPTQ_V2 = GPTQFormat("gptq_v2", zero_offset=0)


def detect(config: dict[str, Any]) -> tuple[GPTQFormat, int] | None:
    """The version and the bits that a ``config.json`` declares, or None for a plain model."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ModelError("the quantization_config is no configuration", "copy config.json again")
    if quantization.get("quant_method") != "gptq":
        raise ModelError(
            f"the model is quantized with {quantization.get('quant_method')}",
            "give a plain model, or one in the gptq format",
        )
    name, bits = quantization.get("checkpoint_format", "gptq"), quantization.get("bits")
    if bits not in BITS:
        raise ModelError(f"the checkpoint says it has {bits} bits", "give one of 2, 3, 4 or 8 bits")
    for rule in quantization.get("dynamic") or {}:
        if not rule.startswith("-:"):
            raise ModelError(
                f"the rule {rule} gives some layers other bits", "give a checkpoint of one width"
            )
    for version in (GPTQ_V1, GPTQ_V2):
        if version.name == name:
            return version, bits
    raise ModelError(f"the checkpoint format {name} is unknown", "write gptq or gptq_v2")
