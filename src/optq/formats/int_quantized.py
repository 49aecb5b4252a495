"""``compressed-tensors``, ``int-quantized``: weights and activations in 8 bits (W8A8).

For a layer ``X`` with codes ``c [N, K]`` and one scale to a row:

    X.weight         int8           [N, K]   c - 128
    X.weight_scale   model's dtype  [N, 1]

The config says that each token of the input has a scale of its own, found when it is read:
:mod:`optq.core.tokens`. transformers rounds the activations and multiplies dequantized weights;
vLLM multiplies the integers, as :mod:`optq.kernels.int8_tokens` does here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optq.core.weight import LayerScheme, QuantizedWeight
from optq.errors import ModelError, SettingError
from optq.formats.compressed_tensors import CompressedTensorsFormat, scale_dtype
from optq.formats.config_groups import INTEGERS, PACKED
from optq.formats.scheme import SCALES, require_fit
from optq.model.checkpoint import TOGETHER

MIDDLE = 128  # the code of zero


@dataclass(frozen=True)
class IntQuantizedFormat(CompressedTensorsFormat):
    """The layout of compressed-tensors for products of integers."""

    name: str = INTEGERS
    suffixes: tuple[str, ...] = ("weight", "weight_scale")
    optional: tuple[str, ...] = ()
    kind: str = INTEGERS
    other: str = PACKED

    def check(
        self, name: str, rows: int, columns: int, layer: LayerScheme, conv1d: bool = False
    ) -> None:
        super().check(name, rows, columns, layer, conv1d)
        if (layer.wbits, layer.groupsize, layer.sym, layer.abits) != (8, -1, True, 8):
            raise SettingError(
                f"{self.name} keeps weights and activations of 8 bits: {name} has others",
                "add --abits 8, or choose another --format",
            )

    def encode(self, layer: QuantizedWeight, dtype: torch.dtype, sym: bool) -> dict[str, Tensor]:
        groupsize = -1 if layer.groups == 1 else layer.width
        scheme = LayerScheme(layer.wbits, groupsize, sym and layer.sym, abits=8)
        self.check("the layer", layer.rows, layer.cols, scheme)
        tensors = {
            "weight": (layer.codes ^ MIDDLE).view(torch.int8).contiguous(),
            "weight_scale": layer.scales.to(scale_dtype(dtype)).contiguous(),
        }
        if not torch.equal(self.decode("", tensors, scheme).weight, layer.weight.float()):
            raise SettingError(
                f"{self.name} keeps scales in {dtype}, which cannot hold those of this model",
                "load the model in float16 or float32 (--dtype)",
            )
        return {suffix: tensor.cpu() for suffix, tensor in tensors.items()}

    def layout(
        self, rows: int, columns: int, layer: LayerScheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        codes = torch.empty(rows, columns, dtype=torch.int8, device="meta")
        scales = codes.new_empty(rows, 1, dtype=scale_dtype(dtype))
        return {"weight": codes, "weight_scale": scales}

    def decode(self, name: str, tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
        codes = tensors["weight"]
        if codes.ndim != 2 or codes.dtype != torch.int8:
            raise ModelError(
                f"{name}.weight is {codes.dtype} {list(codes.shape)}, no codes of 8 bits", TOGETHER
            )
        if (layer.wbits, layer.groupsize, layer.sym) != (8, -1, True):
            raise ModelError(f"{name} has one scale to a row, which its config denies", TOGETHER)
        rows, columns = codes.shape
        fitting = {"weight_scale": ((rows, 1), SCALES)}
        require_fit(name, tensors, fitting, f"{rows} rows of 8 bits")
        scales = tensors["weight_scale"].float()
        zeros = torch.full_like(scales, MIDDLE, dtype=torch.uint8)
        g_idx = torch.zeros(columns, dtype=torch.int32, device=codes.device)
        return QuantizedWeight(8, codes.view(torch.uint8) ^ MIDDLE, scales, zeros, g_idx)


INT_QUANTIZED = IntQuantizedFormat()
