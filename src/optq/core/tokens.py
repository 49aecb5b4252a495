"""Activations in 8 bits: each token has one scale, found when it is read (dynamic, symmetric).

``s = 2 max|x| / 255`` over the token and codes ``-128 .. 127``, as weights have it
(:mod:`optq.core.grid`) and as compressed-tensors computes it; vLLM takes ``max|x| / 127``, which
differs by 0.4%.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

ABITS = 8
HALF = (2**ABITS - 1) / 2
LOW, HIGH = -(2 ** (ABITS - 1)), 2 ** (ABITS - 1) - 1


def by_token(
    x: Float[Tensor, "*tokens cols"],
) -> tuple[Float[Tensor, "*tokens cols"], Float[Tensor, "*tokens 1"]]:
    """Codes, whole numbers in float32 or float64, and the scale of each token."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(-low, high).clamp_(min=0) / HALF
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)  # a token of zeros
    return (x / scale).clamp_(LOW, HIGH).round_(), scale


def int8_by_token(
    x: Float[Tensor, "tokens cols"],
) -> tuple[Int8[Tensor, "tokens cols"], Float[Tensor, "tokens 1"]]:
    """The same with the codes as they are multiplied."""
    codes, scale = by_token(x)
    return codes.to(torch.int8), scale


def rounded(x: Float[Tensor, "*tokens cols"]) -> Float[Tensor, "*tokens cols"]:
    """The values that the codes of ``x`` stand for, in its dtype."""
    codes, scale = by_token(x)
    return codes.mul_(scale).to(x.dtype)
