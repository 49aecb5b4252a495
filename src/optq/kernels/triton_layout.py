"""How the Triton kernels hold codes: planes of 32-bit words, exactly ``wbits`` bits to a weight.

Columns come in slices of 16. Word ``j`` of 16 neighbouring words holds column ``j`` of each of
its slices, so every field of a tile of words, taken alone, is 16 consecutive columns: a kernel
unpacks with shifts and masks and never moves a code from one thread to another, and a row of
words is read in 16-byte loads. The slices of 16 words make a *period*:

=====  ======  =====================================================  ===========
wbits  slices  fields of the words                                    columns
=====  ======  =====================================================  ===========
4      8       slice ``i`` at bit ``4 i``                             128
2      16      slice ``8 p + i`` at bit ``4 i + 2 p``                 256
3      32      low two bits of slice ``16 h + 8 p + i`` in word       512
               ``h`` of two, at bit ``4 i + 2 p``; third bit in one
               word of the plane ``high``, at bit ``4 i + 2 h + p``
8      4       slice ``i`` at bit ``8 i``                             64
=====  ======  =====================================================  ===========

At 2 and 3 bits one shift and one selection of bits give words of eight 4-bit fields, so that all
of 2, 3 and 4 bits are read alike. Columns are padded with code 0 to whole periods. Rejected: one
bit stream (the file's layout), where a kernel loads each word once for every code in it, and a
3-bit code may lie in two words; and 3 bits in 4-bit fields, a third more bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

SLICE = 16  # columns; the depth of one tensor-core product
SLICES = {2: 16, 3: 32, 4: 8, 8: 4}  # in a period


def period(wbits: int) -> int:
    """Columns that 16 words of every plane hold."""
    return SLICE * SLICES[wbits]


def pack_planes(codes: Tensor, wbits: int) -> tuple[Tensor, Tensor | None]:
    """uint8 codes ``[rows, cols]`` to int32 planes ``low [rows, words]`` and ``high`` (3 bits)."""
    rows, span = len(codes), period(wbits)
    padded = pad(codes, (0, -codes.shape[1] % span)).to(torch.int32)
    field = 8 if wbits == 8 else 4
    # [rows, periods, half, part, place, 16]: two halves at 3 bits, two parts below 4 bits
    parts = 2 if wbits < 4 else 1
    fields = padded.view(rows, -1, 2 if wbits == 3 else 1, parts, 32 // field, SLICE)
    if wbits != 3:
        return _merge(fields, field, 2).reshape(rows, -1), None
    low = _merge(fields & 3, field, 2)
    high = _merge((fields >> 2).flatten(2, 3)[:, :, None], field, 1)
    return low.reshape(rows, -1), high.reshape(rows, -1)


def _merge(fields: Tensor, field: int, step: int) -> Tensor:
    """``[.., part, place, 16]`` to words ``[.., 16]``: bit ``field * place + step * part``."""
    words = torch.zeros_like(fields[..., 0, 0, :])
    for part in range(fields.shape[-3]):
        for place in range(fields.shape[-2]):
            words |= fields[..., part, place, :] << (field * place + step * part)
    return words
