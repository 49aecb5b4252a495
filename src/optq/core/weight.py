"""A quantized weight as every part of OPTQ hands it on: codes, grids, and each column's group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

UNCODED = 16  # the ``wbits`` of a weight that is pruned, and has no codes


@dataclass(frozen=True)
class LayerScheme:
    """How one layer is quantized; ``groupsize=-1`` is one group to a row."""

    wbits: int
    groupsize: int
    sym: bool
    actorder: bool = False  # groups follow the order of quantization, not of the columns
    abits: int | None = None  # of the activations it reads, each token with a scale of its own
    conv1d: bool = False  # of a layer without codes: the file has it as [columns, rows]


@dataclass(frozen=True)
class QuantizedWeight:
    """``W[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])`` with ``g = g_idx[k]``."""

    wbits: int
    codes: UInt8[Tensor, "rows cols"]
    scales: Float[Tensor, "rows groups"]
    zeros: UInt8[Tensor, "rows groups"]
    g_idx: Int[Tensor, " cols"]  # int32: the group of each column

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def cols(self) -> int:
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def width(self) -> int:
        """Columns in the first group; a last one may have fewer."""
        return int((self.g_idx == 0).sum())

    @property
    def consecutive(self) -> bool:
        """Whether each group is ``width`` consecutive columns."""
        if self.width == 0:  # nothing in group 0
            return False
        return torch.equal(self.g_idx, group_index(self.cols, self.width, self.g_idx.device))

    @property
    def sym(self) -> bool:
        """Whether every zero point is the middle of the range."""
        return bool((self.zeros == 2 ** (self.wbits - 1)).all())

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        """The dequantized weights ``s * (c - z)``, in the dtype of the scales."""
        return dequantize(self.codes, self.scales, self.zeros, self.g_idx)

    def by_group(self, values: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows groups"]:
        """The sums of ``values`` over the columns of each group."""
        if self.consecutive and self.cols == self.groups * self.width:
            return values.view(self.rows, self.groups, -1).sum(-1)
        # A product, for a sum by index has another order each time on a GPU.
        groups = torch.arange(self.groups, device=values.device)
        return values @ (self.g_idx[:, None] == groups).to(values.dtype)

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on another device."""
        names = ("codes", "scales", "zeros", "g_idx")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def sorted(self) -> tuple[QuantizedWeight, Int[Tensor, " cols"] | None]:
        """Columns ordered by group, and the order: ``sorted.codes = codes[:, order]``.

        The order is None where they are in order already. A product is then
        ``x[..., order] @ sorted.weight.T``.
        """
        if bool((self.g_idx[1:] >= self.g_idx[:-1]).all()):
            return self, None
        order = torch.argsort(self.g_idx, stable=True)
        return replace(self, codes=self.codes[:, order], g_idx=self.g_idx[order]), order


@dataclass(frozen=True)
class SparseWeight(QuantizedWeight):
    """A weight that is pruned, and not quantized, as it is handed on beside the others.

    Its ``codes`` are 1 where something is left, and 0 elsewhere; ``values`` are what is left.
    """

    values: Float[Tensor, "rows cols"]

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        return self.values

    @classmethod
    def of(cls, values: Float[Tensor, "rows cols"]) -> SparseWeight:
        rows, columns = values.shape
        grids = values.new_ones(rows, 1), values.new_zeros(rows, 1, dtype=torch.uint8)
        group = group_index(columns, columns, values.device)
        return cls(UNCODED, (values != 0).to(torch.uint8), *grids, group, values)


def affine(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """``s * (c - z)`` in the dtype of the scales, which is at least float16: codes are exact."""
    return codes.to(scales.dtype).sub_(zeros).mul_(scales)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    decode: Callable[[Tensor, Tensor, Tensor], Tensor] = affine,
) -> Tensor:
    """The values of codes ``[rows, cols]`` on grids ``[rows, groups]``, in the scales' dtype."""
    (rows, columns), groups = codes.shape, scales.shape[1]
    zeros, width = zeros.to(scales.dtype), -(-columns // groups)
    if columns == groups * width and torch.equal(g_idx, group_index(columns, width, g_idx.device)):
        grouped = codes.reshape(rows, groups, width)  # no copy of the grids for each weight
        return decode(grouped, scales[:, :, None], zeros[:, :, None]).view(rows, columns)
    group = g_idx.long()
    return decode(codes, scales[:, group], zeros[:, group])


def group_index(columns: int, width: int, device: torch.device) -> Tensor:
    """``k // width`` for each column ``k``, int32."""
    return (torch.arange(columns, device=device) // width).to(torch.int32)
