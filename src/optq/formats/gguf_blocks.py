"""A quantized layer as llama.cpp's blocks: 32 consecutive columns of a row and an fp16 scale ``d``.

A scale of more columns, or of the whole row, is repeated in each of its blocks. With
``s * (c - z)`` the value of code ``c``:

    Q4_0  d, 16 bytes     d * (q - 8)   q = c - z + 8, exact: 4 bits symmetric, 2 and 3 bits
    Q4_1  d, m, 16 bytes  d * q + m     q = c, m = -s z, rounded where fp16 does not hold it
    Q8_0  d, 32 bytes     d * q         q = c - z, exact: 8 bits symmetric

Byte ``i`` of 16 holds value ``i`` in its low half and value ``i + 16`` in its high one, and 32
bytes are signed: the layout of llama.cpp's ``ggml-common.h``.

Rejected: Q5_0, which holds 4 bits asymmetric exactly, for half a bit more to a weight than Q4_1.
"""

from __future__ import annotations

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from optq.core.grid import IntegerGrid, Storage
from optq.core.rounding import round_groups, working_copy
from optq.core.weight import QuantizedWeight, group_index
from optq.errors import SettingError

BLOCK = 32  # columns
ROWS_AT_ONCE = 2**13  # of an embedding that is rounded
ROUNDED = {8: Kind.Q8_0, 4: Kind.Q4_0}


def choose(layer: QuantizedWeight, name: str) -> tuple[Kind, float]:
    """The type for a layer, and how far fp16 moves its minima, as a fraction of their scale.

    Raises :class:`SettingError` for a layer that no type holds.
    """
    exact = 2**layer.wbits - 8 <= int(layer.zeros.min()) and int(layer.zeros.max()) <= 8
    kind = Kind.Q8_0 if layer.wbits == 8 else Kind.Q4_0 if exact else Kind.Q4_1
    minima = _minima(layer.scales, layer.zeros)
    if misfit := misfits(layer.cols, layer.width, layer.wbits, layer.sym, layer.consecutive):
        raise _misfit(name, *misfit)
    for refused, reason, remedy in (
        (
            not torch.equal(layer.scales.half().float(), layer.scales),
            "float16 does not hold its scales",
            "quantize again with --format gptq, whose scales are float16",
        ),
        (
            kind == Kind.Q4_1 and not minima.half().isfinite().all(),
            "float16 does not hold its minima",
            "quantize again with --sym",
        ),
    ):
        if refused:
            raise _misfit(name, reason, remedy)
    if kind != Kind.Q4_1:
        return kind, 0.0
    steps = torch.where(layer.scales == 0, 1, layer.scales).abs()
    return kind, float(((minima.half().float() - minima).abs() / steps).max())


def misfits(
    cols: int, width: int, wbits: int, sym: bool, consecutive: bool
) -> tuple[str, str] | None:
    """Why no type holds a layer with groups of ``width`` columns, and what to do; or None."""
    again = "quantize again with"
    for refused, reason, remedy in (
        (
            cols % BLOCK,
            f"its {cols} columns are no multiple of 32",
            f"{again} --skip for this layer",
        ),
        (
            not consecutive,
            "its groups follow the order of quantization",
            f"{again} --static-groups",
        ),
        (
            width % BLOCK,
            f"its groups of {width} columns are no multiple of 32",
            f"{again} --groupsize 32, 64, 128 or -1",
        ),
        (wbits == 8 and not sym, "it is asymmetric at 8 bits", f"{again} --sym"),
    ):
        if refused:
            return reason, remedy
    return None


def _misfit(name: str, reason: str, remedy: str) -> SettingError:
    return SettingError(f"{name} does not fit llama.cpp's blocks: {reason}", remedy)


def encode(layer: QuantizedWeight, kind: Kind) -> Tensor:
    """The blocks of a layer, row by row: uint8 ``[rows, cols / 32 * bytes of a block]``."""
    group = layer.g_idx[::BLOCK].long()
    scales, zeros = layer.scales[:, group], layer.zeros[:, group]
    codes = layer.codes.view(layer.rows, -1, BLOCK)
    head = [scales.half()]
    if kind == Kind.Q4_1:
        head.append(_minima(scales, zeros).half())
    else:
        # uint8 wraps around: the bits of a difference below zero are those of its int8.
        codes = codes - zeros[:, :, None] + (8 if kind == Kind.Q4_0 else 0)
    if kind != Kind.Q8_0:
        codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    parts = [part[:, :, None].view(torch.uint8) for part in head]
    return torch.cat([*parts, codes], dim=-1).view(layer.rows, -1)


def rounded(weight: Tensor, kind: Kind) -> Tensor:
    """The blocks, of a ``kind`` in :data:`ROUNDED`, of a weight that is not quantized.

    Each value is rounded to the nearest, and the range of each block is searched.
    """
    (wbits,) = (bits for bits, each in ROUNDED.items() if each == kind)
    grid, parts = IntegerGrid(wbits, BLOCK, sym=True, mse=True), []
    group = group_index(weight.shape[1], BLOCK, weight.device)
    for some in weight.split(ROWS_AT_ONCE):
        W = working_copy(some)
        found = round_groups(W, group, grid, Storage(), W.new_ones(len(W), 1))
        codes, zeros = found.codes.T.contiguous(), found.zero.T.to(torch.uint8)
        parts.append(encode(QuantizedWeight(wbits, codes, found.scale.T, zeros, group), kind))
    return torch.cat(parts)


def _minima(scales: Tensor, zeros: Tensor) -> Tensor:
    """``-s z`` in float32: exact, 11 bits times 8."""
    return -scales * zeros.float()
