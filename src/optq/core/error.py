"""The error ``(W - Q) H (W - Q)^T`` of quantized rows; ``miss`` is ``W - Q``, transposed.

A product in bfloat16 costs a quarter of one in float32 where the hardware has it. That serves for
round-to-nearest's error, whose misses are independent, where it is far above the solver's. It does
not serve for a solver's own: those misses cancel along the strong directions of ``H``, and entries
of ``H`` that are alike are rounded alike.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optq.core.precision import exact_products, quick_dtype
from optq.core.problem import Factor
from optq.core.tiles import tiles


def damped_error(
    miss: Float[Tensor, "cols rows"], factored: Factor, exact: bool = True
) -> Float[Tensor, " rows"]:
    """``miss^T (H + damp I) miss`` row by row, as ``|U^T miss|^2``; in float32 at least.

    ``U`` is triangular, so this is half the work of a product with ``H``. Unless ``exact``, the
    product may run in bfloat16: see :func:`compare_with_rounding`.
    """
    columns, rows = miss.shape
    dtype = factored.N.dtype if exact else quick_dtype(factored.N)
    N, miss = factored.N.to(dtype), miss.to(dtype)
    total = torch.zeros(rows, dtype=factored.N.dtype, device=miss.device)
    for tile in tiles(columns):
        product = (N[: tile.stop, tile].T @ miss[: tile.stop]).to(total.dtype)
        # No product of a vector: those of MKL have a row's bits depend on the threads.
        total += product.square_().mul_(factored.squares[tile, None]).sum(0)
    return total


def factored_error(miss: Float[Tensor, "cols rows"], factored: Factor) -> Float[Tensor, " rows"]:
    """``miss^T H miss`` row by row, in full precision."""
    norm = miss.square().mul_(factored.live[:, None]).sum(0)
    return (damped_error(miss, factored) - factored.damp * norm).clamp_(min=0)


@exact_products()
def undamped_error(
    miss: Float[Tensor, "cols rows"], H: Float[Tensor, "cols cols"]
) -> Float[Tensor, " rows"]:
    """``miss^T H miss`` row by row; in full precision, if ``H`` is.

    Tiles above the diagonal count twice.
    """
    total, other = miss.new_zeros(miss.shape[1]), miss.to(H.dtype)
    for tile in tiles(len(H)):
        product = H[tile, tile] @ other[tile]
        product.addmm_(H[tile, : tile.start], other[: tile.start], alpha=2)
        total += product.to(miss.dtype).mul_(miss[tile]).sum(0)
    return total.clamp_(min=0)


@exact_products()
def output_energy(
    weight: Float[Tensor, "rows cols"], H: Float[Tensor, "cols cols"]
) -> Float[Tensor, " rows"]:
    """``W H W^T`` row by row: the mean square of the layer's output per token.

    In bfloat16 where that is fast: its rounding averages out to less than 1e-3 of the sum.
    """
    total, quick = H.new_zeros(len(weight)), quick_dtype(H)
    weight, H = weight.to(quick), H.to(quick)
    for tile in tiles(len(H)):  # not of the transpose, which is slow to make
        product = weight[:, tile] @ H[tile, tile]
        product.addmm_(weight[:, : tile.start], H[: tile.start, tile], alpha=2)
        total += product.mul_(weight[:, tile]).sum(1, dtype=total.dtype)
    return total.clamp_(min=0)


def weighted_squares(
    weights: Float[Tensor, "kinds cols"], miss: Float[Tensor, "cols rows"]
) -> Float[Tensor, "kinds rows"]:
    """``weights @ miss^2``, a few columns at a time: a large temporary costs more than the sum."""
    total = weights.new_zeros(len(weights), miss.shape[1])
    for start in range(0, miss.shape[0], 128):
        part = miss[start : start + 128].to(weights.dtype)
        total += weights[:, start : start + 128] @ part.square()
    return total


def compare_with_rounding(
    error: Float[Tensor, " rows"],
    damped: Float[Tensor, " rows"],
    miss: Float[Tensor, "cols rows"],
    factored: Factor,
) -> tuple[Bool[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Whether ``error`` is surely below that of ``miss``, given :func:`damped_error` in bfloat16.

    Also returns that error, undamped, as good as bfloat16 gives it: a row's may be off by a few
    percent, the sum is not. Rounding both factors of
    ``U^T miss`` to 8 bits moves its norm by about ``2^-9 sqrt(sum_j miss_j^2 (H + damp I)_jj)``,
    rounding the product by less than ``2^-9`` of itself; what four times the one and twice the
    other could change is not sure.
    """
    kinds = torch.stack([factored.live, factored.live * factored.diagonal])
    norm, spread = weighted_squares(kinds, miss)
    other = damped - factored.damp * norm
    least = (1 - 2 * 2**-9) * damped.sqrt() - 4 * 2**-9 * spread.sqrt()
    least = least.clamp_(min=0).square_()
    return error < least - factored.damp * norm, other.clamp_(min=0)


def total(rows: Float[Tensor, " rows"]) -> float:
    """The sum over rows, the same for any number of threads: they share larger sums."""
    return sum(part.sum().item() for part in rows.split(2**14))


def apart(
    one: Float[Tensor, "*tokens hidden"], other: Float[Tensor, "*tokens hidden"]
) -> tuple[float, float]:
    """The squared difference of hidden states and the square of the ``other``, summed over all."""
    one, other = (each.flatten(0, -2).float() for each in (one, other.to(one.device)))
    parts = zip(one.split(2**12), other.split(2**12), strict=True)
    sums = [((x - y).square().sum(1), y.square().sum(1)) for x, y in parts]
    return sum(total(x.double()) for x, _ in sums), sum(total(y.double()) for _, y in sums)
