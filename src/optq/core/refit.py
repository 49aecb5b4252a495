"""Least squares on what is left of a pruned weight: conjugate gradients, all rows at a time.

For each row, ``min over v`` of ``(w - v) H (w - v)^T`` with ``v = 0`` where the weight was removed.
Rows keep other columns each, so none shares a factor with another; but all steps of all rows are
one product with ``H``. The preconditioner is the diagonal. A step costs ``rows * cols^2``
multiply-adds, in bfloat16 where that is fast. There the strongest direction of ``H`` is kept apart,
in full precision: inputs that share a mean, or a few tokens of great size, make one that is a
hundred times the next, along which misses cancel, and rounding would undo that. Rows that gained
nothing in the end, which is measured in full precision, stay as they were.

Everything is held transposed, ``[cols, rows]``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optq.core.error import damped_error
from optq.core.precision import exact_products, quick_dtype
from optq.core.problem import Problem

DEEP = 512  # columns multiplied at a time: of more, a row's bits depend on those beside it
POWERS = 10  # products that find the strongest direction


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
    quick = quick_dtype(problem.H)
    strongest, much = _strongest(problem.H) if quick != problem.H.dtype else (None, 0.0)
    H = problem.H if strongest is None else problem.H - much * strongest * strongest.T
    H = H.to(quick)
    damp, scale = factored.damp, keep / factored.diagonal[:, None]

    def product(x: Tensor) -> Tensor:
        y, quickly = x * damp, x.to(quick)
        for part, own in zip(H.split(DEEP, dim=1), quickly.split(DEEP), strict=True):
            y += part @ own
        if strongest is not None:
            y.addcmul_(strongest, (strongest * x).sum(0), value=much)
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


def _strongest(H: Float[Tensor, "cols cols"]) -> tuple[Float[Tensor, "cols 1"], float]:
    """The direction of the largest eigenvalue, nearly, and what ``H`` is along it."""
    direction = H[:, H.diagonal().argmax(), None].clone()
    much = 0.0
    for _ in range(POWERS):
        size = direction.norm()
        if size == 0:
            break
        direction /= size
        # No product of a vector: those of MKL depend on the number of threads.
        made = torch.cat([(part * direction[:, 0]).sum(1) for part in H.split(DEEP)])[:, None]
        much, last, direction = (made * direction).sum().item(), direction, made
    else:
        direction = last
    return direction, much
