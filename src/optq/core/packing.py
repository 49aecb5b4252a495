"""Codes of 2, 3, 4 or 8 bits in 32-bit words.

One little-endian bit stream: value ``i`` occupies stream bits ``i*b .. i*b + b - 1``, least
significant first; word ``w`` is stream bits ``32w .. 32w + 31``, held as a signed int32. At
3 bits values 10 and 21 of each 32 cross from one word into the next (32 values in 3 words).
"""

from __future__ import annotations

import torch
from jaxtyping import Int32, Integer, UInt8
from torch import Tensor

from optq.errors import SettingError


def pack(values: Integer[Tensor, "count streams"], bits: int) -> Int32[Tensor, "words streams"]:
    """Pack each column of ``values`` (``0 .. 2**bits - 1``) into int32 words, down dimension 0.

    Raises ``SettingError`` where ``count * bits`` is not a multiple of 32.
    """
    count, streams = values.shape
    if count * bits % 32:
        raise SettingError(
            f"{count} values of {bits} bits do not fill 32-bit words",
            "leave this layer dense (--skip) or choose other bits",
        )
    # The fewest values that fill whole words make one period, handled by slices of all periods.
    period_values = 32 if bits == 3 else 32 // bits
    period_words = period_values * bits // 32
    periods = values.reshape(-1, period_values, streams)
    words = torch.zeros(
        len(periods), period_words, streams, dtype=torch.int32, device=values.device
    )
    for i in range(period_values):
        word, shift = divmod(i * bits, 32)
        value = periods[:, i].to(torch.int32)
        words[:, word] |= value << shift  # what leaves the word at its top is gone
        if shift + bits > 32:
            words[:, word + 1] |= value >> (32 - shift)
    return words.reshape(-1, streams)


def unpack(words: Int32[Tensor, "words streams"], bits: int) -> UInt8[Tensor, "count streams"]:
    """The inverse of :func:`pack`, as uint8."""
    streams = words.shape[1]
    period_values = 32 if bits == 3 else 32 // bits
    period_words = period_values * bits // 32
    periods = words.reshape(-1, period_words, streams)
    values = torch.empty(
        len(periods), period_values, streams, dtype=torch.uint8, device=words.device
    )
    for i in range(period_values):
        word, shift = divmod(i * bits, 32)
        value = periods[:, word] >> shift  # a negative word drags ones in: masked away below
        if shift + bits > 32:
            value &= 2 ** (32 - shift) - 1
            value |= periods[:, word + 1] << (32 - shift)
        values[:, i] = value.bitwise_and_(2**bits - 1)
    return values.reshape(-1, streams)
