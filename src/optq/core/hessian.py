"""The Hessian of a site, ``H = X X^T / tokens``, and its factor.

Sums are float32. Where the activations are bfloat16, their products are exact in float32, so the
CPU's bfloat16 matrix units (AMX, AVX512-BF16) give the same sums about three times faster; only
there is torch's reduced precision allowed. ``H`` is symmetric: only tiles on and above the
diagonal are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optq.errors import NumericsError, SettingError

TILE = 1024  # columns of H computed by one product; smaller tiles run below the units' speed


class Hessian:
    """Accumulates ``X X^T`` over the calibration batches of one site."""

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, device=device, dtype=dtype)

    def add(self, inputs: Float[Tensor, "*batch columns"]) -> None:
        """Add one batch of inputs; each leading index is one token."""
        x = inputs.reshape(-1, inputs.shape[-1])
        add_product(self._sum, x, x, symmetric=True)
        self.tokens += x.shape[0]

    def matrix(self) -> Float[Tensor, "columns columns"]:
        """``X X^T / tokens``, symmetric."""
        upper = self._sum.triu() / max(self.tokens, 1)
        return upper + upper.triu(1).T


def add_product(total: Tensor, left: Tensor, right: Tensor, symmetric: bool = False) -> None:
    """``total += left^T right`` over tokens; if ``symmetric``, on and above the diagonal only."""
    exact_in_bfloat16 = left.dtype == right.dtype == torch.bfloat16
    columns = total.shape[0]
    if left.device.type == "cpu" or left.dtype == total.dtype:
        left_t, right = left.to(total.dtype).T, right.to(total.dtype)
        with reduced_precision(exact_in_bfloat16 and total.dtype == torch.float32):
            for start in range(0, columns, TILE):
                rows = slice(start, start + TILE)
                first = start if symmetric else 0
                total[rows, first:].addmm_(left_t[rows], right[:, first:])
    else:  # CUDA multiplies in the activations' own dtype and returns float32 sums
        for start in range(0, columns, TILE):
            rows = slice(start, start + TILE)
            first = start if symmetric else 0
            total[rows, first:] += torch.mm(
                left[:, rows].T, right[:, first:], out_dtype=total.dtype
            )


@contextmanager
def reduced_precision(allowed: bool) -> Iterator[None]:
    """Let float32 products run on bfloat16 units, where ``allowed``, inside this block only."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Factor:
    """``H + damp I = U U^T`` with ``U`` upper triangular; ``dead`` columns have a zero input."""

    U: Float[Tensor, "cols cols"]
    damp: float
    tries: int
    dead: Bool[Tensor, " cols"]


def find_dead(H: Float[Tensor, "cols cols"]) -> Bool[Tensor, " cols"]:
    """The columns whose input was zero in every token."""
    return H.diagonal() == 0


def factor(H: Float[Tensor, "cols cols"], percdamp: float) -> Factor:
    """Factor ``H + d I`` with ``d = percdamp * mean(diag H)``.

    If that is not positive definite in floating point (fewer tokens than columns, duplicated
    columns), ``d`` grows tenfold until it is, up to the mean of the diagonal itself.

    Raises :class:`NumericsError` if ``H`` holds a NaN or infinity.
    """
    diagonal = H.diagonal()
    mean = diagonal.mean().item()
    if not torch.isfinite(H.sum()):
        raise NumericsError(
            "the Hessian is not finite", "look for extreme activations in the calibration text"
        )
    dead = find_dead(H)
    # One Cholesky with both axes reversed gives the upper factor U U^T instead of L L^T.
    reversed_H = H.flip(0, 1)
    reversed_diagonal = reversed_H.diagonal()
    # A dead column is decoupled from all others and its weight is zero: any pivot will do.
    reversed_diagonal.masked_fill_(dead.flip(0), mean if mean > 0 else 1.0)
    damp, added, tries = percdamp * mean, 0.0, 0
    while True:
        reversed_diagonal.add_(damp - added)
        added = damp
        L, info = torch.linalg.cholesky_ex(reversed_H)
        if info.item() == 0 and torch.isfinite(L.diagonal().min()):
            return Factor(L.flip(0, 1), damp, tries, dead)
        if damp >= mean:
            raise NumericsError(
                "the Hessian cannot be factored at any damping",
                "look for extreme activations in the calibration text",
            )
        damp, tries = min(max(10 * damp, 1e-6 * mean), mean), tries + 1


def check_percdamp(percdamp: float) -> None:
    """Refuse a damping that is no fraction."""
    if not 0 <= percdamp <= 1:
        raise SettingError(f"percdamp is {percdamp}", "choose a fraction from 0 to 1, such as 0.01")


def row_error(
    miss: Float[Tensor, "cols rows"], factored: Factor, exact: bool = False
) -> Float[Tensor, " rows"]:
    """``miss^T H miss`` row by row, ``H`` not damped, as ``|U^T miss|^2 - damp |miss|^2``.

    ``U`` is triangular, so this is half the work of a product with ``H``. Unless ``exact``,
    it may run on bfloat16 units: :func:`worse_than` knows how far off that can be.
    """
    U, columns = factored.U, miss.shape[0]
    damped = miss.new_zeros(miss.shape[1])
    tile = max(256, columns // 8)
    with reduced_precision(not exact):
        for start in range(0, columns, tile):
            stop = min(start + tile, columns)
            damped += (U[:stop, start:stop].T @ miss[:stop]).square_().sum(0)
    return damped.sub_(miss.square().sum(0), alpha=factored.damp).clamp_(min=0)


def worse_than(
    error: Float[Tensor, " rows"], other_miss: Float[Tensor, "cols rows"], factored: Factor
) -> tuple[Tensor, Float[Tensor, " rows"]]:
    """The rows whose ``error`` is above that of ``other_miss``, and that other error.

    The other error is first computed in reduced precision: rounding both factors to 8 bits moves
    the norm ``|U^T miss|`` by about ``2^-9 sqrt(sum_j miss_j^2 H_jj)``. Rows where four times as
    much could change the answer are computed again in full precision.
    """
    other = row_error(other_miss, factored)
    spread = (factored.U.square().sum(1)[:, None] * other_miss.square()).sum(0)
    damped = other + factored.damp * other_miss.square().sum(0)
    least = (damped.sqrt() - 4 * 2**-9 * spread.sqrt()).clamp_(min=0).square() - (damped - other)
    unsure = torch.nonzero(error >= least).flatten()
    if unsure.numel():
        other[unsure] = row_error(other_miss[:, unsure], factored, exact=True)
    return torch.nonzero(error > other).flatten(), other
