"""OBS, the Optimal Brain Surgeon (Hassibi & Stork, 1993): remove one weight, repair the others.

With ``H`` the Hessian of a row's error ``dw^T H dw``, setting weight ``p`` to zero is best paid
for by ``dw = -w_p / [H^-1]_pp * H^-1[:, p]``, at the cost ``w_p^2 / (2 [H^-1]_pp)``, half the
rise of that error. Optimal Brain Quantization moves weight ``p`` to a grid value instead of to
zero, with the same two formulas: see :mod:`optq.core.obq`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def remove(
    w: Float[Tensor, " cols"], inverse: Float[Tensor, "cols cols"], p: int
) -> tuple[Float[Tensor, " cols"], float]:
    """The row without weight ``p``, the others repaired, and the cost ``L_p``."""
    pivot = inverse[p, p]
    repaired = w - w[p] / pivot * inverse[:, p]
    repaired[p] = 0
    return repaired, (w[p].square() / (2 * pivot)).item()


def eliminate(inverse: Float[Tensor, "rows cols cols"], p: Tensor) -> None:
    """Drop weight ``p[r]`` from row ``r``'s inverse Hessian, in place.

    ``H^-1 <- H^-1 - H^-1[:, p] H^-1[p, :] / [H^-1]_pp``: what stays is the inverse of ``H``
    without row and column ``p``, whose own entries become zero.
    """
    rows = torch.arange(len(p), device=p.device)
    column = inverse[rows, :, p]
    pivot = inverse[rows, p, p]
    inverse.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None, :], alpha=-1)
    inverse[rows, p, :] = 0
    inverse[rows, :, p] = 0
