"""LLM.int8() (Dettmers, Lewis, Belkada, Zettlemoyer, NeurIPS 2022), to be compared with.

A layer's product is parted by the columns of its input. Those that hold a value above a threshold
(6.0) for any token of the call are *outliers*, and are multiplied in 16 bits, by the weights as
they are; the others in 8 bits, vector-wise: each token of ``X`` and each row of ``W`` has a scale
``max|.| / 127``,

    Y = X_O W_O^T + s_x s_w (X_8 W_8^T)

This is a reference: it says what the method leaves of a model anywhere, holds both weights, and is
not fast. bitsandbytes is: ``optq quantize --method llm-int8``. As there, a row's scale is that of
all its columns, for which are outliers is known only when the input is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optq.errors import SettingError, require_positive
from optq.model.blocks import Block

THRESHOLD = 6.0
MOST = 127


@dataclass(frozen=True)
class LLMInt8:
    """The method with its ``threshold``. Errors: ``SettingError``."""

    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        require_positive({"threshold": self.threshold})

    def check(self, blocks: Sequence[Block]) -> None:
        """Refuse experts. Errors: ``SettingError``."""
        for block in blocks:
            if block.banks:
                raise SettingError(
                    f"{block.banks[0].name} are experts, which LLM.int8() is not written for here",
                    "leave llm-int8 out of --methods",
                )

    def apply(self, model: nn.Module, blocks: Sequence[Block]) -> int:
        """Put an :class:`Int8Linear` in the place of each layer; the bytes that they would take.

        A module that has several places is in all of them, as before. Errors: as :meth:`check`.
        """
        self.check(blocks)
        places: dict[nn.Module | None, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                places.setdefault(child, []).append((parent, name))
        size = 0
        for layer in (layer for block in blocks for layer in block.layers):
            bias = getattr(layer.module, "bias", None)
            made = Int8Linear(layer.weight, bias, self)
            for parent, name in places[layer.module]:
                setattr(parent, name, made)
            rows, columns = layer.shape
            size += rows * columns + 2 * rows
        return size


class Int8Linear(nn.Module):
    """``x @ W.T + bias`` by LLM.int8(). ``outliers`` of ``columns`` were so, of all calls."""

    weight: Tensor
    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, how: LLMInt8) -> None:
        super().__init__()
        wide = torch.promote_types(weight.dtype, torch.float32)
        codes, scales = vector_wise(weight.to(wide))
        half = weight if weight.itemsize == 2 else weight.half()
        for name, tensor in (
            ("weight", half),
            ("codes", codes.to(torch.int8)),
            ("scales", scales),
            ("bias", bias),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self.threshold, self.outliers, self.columns = how.threshold, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        wide = tokens.to(torch.promote_types(x.dtype, torch.float32))
        out = (wide.abs() > self.threshold).any(0)
        self.outliers, self.columns = self.outliers + int(out.sum()), self.columns + len(out)
        codes, scale = vector_wise(wide.masked_fill(out, 0))
        y = (codes @ self.codes.to(wide.dtype).T) * scale * self.scales.T
        # Sums of 16-bit products are kept in 32 bits, as tensor cores do.
        halves = tokens[:, out].to(self.weight.dtype).to(wide.dtype)
        y += halves @ self.weight[:, out].to(wide.dtype).T
        if (bias := self._buffers["bias"]) is not None:
            y += bias
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def vector_wise(
    x: Float[Tensor, "vectors count"],
) -> tuple[Float[Tensor, "vectors count"], Float[Tensor, "vectors 1"]]:
    """Codes ``-127 .. 127`` in the dtype of ``x``, and one scale to a vector."""
    top = x.abs().amax(1, keepdim=True)
    scale = torch.where(top == 0, 1.0, top / MOST)
    return (x / scale).round_(), scale
