"""``dense``: weights that were pruned, and not quantized, as the source has them, zeros included.

A layer ``X`` stays ``X.weight`` in the model's dtype, and the config says nothing of a method: any
program that loads the source loads the result. ``Conv1D`` keeps it as ``[columns, rows]``.

compressed-tensors had two layouts for such weights, ``sparse-bitmask`` and ``sparse-24-bitmask``.
Its releases since 0.19 keep their names and no code that reads or writes them: neither is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optq.core.grid import Storage
from optq.core.weight import LayerScheme, QuantizedWeight, SparseWeight
from optq.formats.scheme import Detected, Format, Schemes


@dataclass(frozen=True)
class DenseFormat(Format):
    """No row of ``FORMATS``: nothing in such a checkpoint says that it is one."""

    name: str = "dense"
    suffixes: tuple[str, ...] = ("weight",)

    def storage(self, dtype: torch.dtype) -> Storage:
        return Storage((), weight_dtype=dtype)

    def check(
        self, name: str, rows: int, columns: int, layer: LayerScheme, conv1d: bool = False
    ) -> None:
        """It holds any layer."""

    def encode(self, layer: QuantizedWeight, dtype: torch.dtype, sym: bool) -> dict[str, Tensor]:
        return {"weight": layer.weight.to("cpu", dtype).contiguous()}

    def layout(
        self, rows: int, columns: int, layer: LayerScheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"weight": torch.empty(rows, columns, dtype=dtype, device="meta")}

    def decode(self, name: str, tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
        return SparseWeight.of(tensors["weight"])

    def config(
        self, layers: Schemes, dense: list[str], percdamp: float, outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        return {}

    def detect(self, settings: dict[str, Any]) -> Detected | None:
        return None


DENSE = DenseFormat()
