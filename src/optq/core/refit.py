"""Least squares on what is left of a pruned weight: conjugate gradients, all rows at a time.

For each row, ``min over v`` of ``(w - v) H (w - v)^T`` with ``v = 0`` where the weight was removed.
Rows keep other columns each, so none shares a factor with another; but all steps of all rows are
one product with ``H``. The preconditioner is the diagonal. A step costs ``rows * cols^2``
multiply-adds, in full precision: inputs that share a mean, or a few tokens of great size, make
directions of ``H`` a hundred times the next, along which misses cancel, and products in bfloat16
undo that. Rows that gained nothing in the end stay as they were.

Everything is held transposed, ``[cols, rows]``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optq.core.error import damped_error
from optq.core.precision import exact_products
from optq.core.problem import Problem

DEEP = 512  # columns multiplied at a time: of more, a row's bits depend on those beside it


@exact_products()
def refit(
    target: Float[Tensor, "cols rows"],
    values: Float[Tensor, "cols rows"],
    keep: Bool[Tensor, "cols rows"],
    problem: Problem,
    steps: int,
) -> Float[Tensor, "cols rows"]:
    """``values`` moved towards the best for ``target``, by so many steps; zeros stay.

    The problem is the damped one: along inputs that were hardly seen, little is moved.
    """
    factored = problem.factor
    H, damp, scale = problem.H, factored.damp, keep / factored.diagonal[:, None]

    def product(x: Tensor) -> Tensor:
        y = x * damp
        for part, own in zip(H.split(DEEP, dim=1), x.split(DEEP), strict=True):
            y.addmm_(part, own)
        return y

    start, values = values, values.clone()
    residual = product(target - values).mul_(keep)
    ahead = residual * scale
    direction, size = ahead, (residual * ahead).sum(0)
    for step in range(steps):
        spread = product(direction).mul_(keep)
        curve = (direction * spread).sum(0)
        length = torch.where(curve > 0, size / curve, 0)
        values.addcmul_(direction, length)
        if step + 1 == steps:
            break
        residual.addcmul_(spread, length, value=-1)
        ahead, before = residual * scale, size
        size = (residual * ahead).sum(0)
        direction = ahead.addcmul(direction, torch.where(before > 0, size / before, 0))
    gained = damped_error(target - values, factored) <= damped_error(target - start, factored)
    return torch.where(gained, values, start)
