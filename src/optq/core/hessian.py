"""The Hessian of a site, ``H = X X^T / tokens``, and its factor.

Sums are float32. Where the activations are bfloat16, their products are exact in float32, so the
CPU's bfloat16 units (AMX, AVX512-BF16) give the same sums two to three times faster; only there
is torch's reduced precision allowed. ``H`` is symmetric: only tiles on and above the
diagonal are computed. The product with the difference of two streams is held to less: see
:func:`add_drift`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optq.errors import NumericsError, SettingError

TILE = 256  # rows of H computed by one product: the diagonal's tiles are half wasted
TOKENS = 4096  # multiplied at a time
CHOLESKY_BLOCK = 256  # columns that LAPACK factors at a time


class Hessian:
    """Accumulates ``X X^T`` over the calibration batches of one site."""

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tokens = 0
        self._finished = False
        self._sum = torch.zeros(columns, columns, device=device, dtype=dtype)
        # A copy in the dtype of the sum, in memory that is touched once and then reused.
        self._copy: Tensor | None = None

    def add(self, inputs: Float[Tensor, "*batch columns"]) -> None:
        """Add one batch of inputs; each leading index is one token."""
        x = inputs.reshape(-1, len(self._sum))
        exact_in_bfloat16 = x.dtype == torch.bfloat16 and self._sum.dtype == torch.float32
        with reduced_precision(exact_in_bfloat16):
            for chunk in x.split(TOKENS):
                self._add(self._convert(chunk))
        self.tokens += x.shape[0]

    def matrix(self) -> Float[Tensor, "columns columns"]:
        """``X X^T / tokens``. It is the accumulator's own memory: nothing can be added later."""
        H = self._sum
        if self._finished:
            return H
        self._finished = True
        H.div_(max(self.tokens, 1))
        for start in range(0, len(H), TILE):
            stop = start + TILE
            corner = H[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
            H[stop:, start:stop] = H[start:stop, stop:].T
        return H

    def _convert(self, chunk: Tensor) -> Tensor:
        if chunk.device.type != "cpu":
            return chunk  # a GPU multiplies in their own dtype and returns float32 sums
        if self._copy is None or len(self._copy) < len(chunk):
            self._copy = torch.empty(len(chunk), len(self._sum), dtype=self._sum.dtype)
        return self._copy[: len(chunk)].copy_(chunk)

    def _add(self, x: Tensor) -> None:
        for start in range(0, len(self._sum), TILE):
            _add_product(
                self._sum[start : start + TILE, start:], x[:, start : start + TILE], x[:, start:]
            )


def add_drift(
    total: Float[Tensor, "columns columns"],
    inputs: Float[Tensor, "*batch columns"],
    full: Float[Tensor, "*batch columns"],
) -> None:
    """Add ``D X^T``, ``D = Y - X``, to ``total``: the full-precision model's inputs are ``Y``.

    Formed from the difference: ``Y X^T - X X^T`` would take the small from the large. Where the
    activations are bfloat16 the products, each over ``TOKENS`` tokens, are rounded to it as well,
    at twice the speed. Along strong inputs that all share (a mean of ten deviations) the rounding
    can come to a few percent of what error propagation corrects; else to less than 1e-3.
    """
    x, y = (each.reshape(-1, len(total)) for each in (inputs, full))
    for chunk, other in zip(x.split(TOKENS), y.split(TOKENS), strict=True):
        if chunk.device.type != "cpu":
            _add_product(total, other - chunk, chunk)
        elif chunk.dtype == torch.bfloat16 and fast_bfloat16(chunk.device):
            total += (other - chunk).T @ chunk
        else:
            chunk = chunk.to(total.dtype)
            total.addmm_((other.to(total.dtype) - chunk).T, chunk)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right``, in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += torch.mm(left.T, right, out_dtype=total.dtype)


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
    """``H + damp I = U U^T`` with ``U = N diag(pivots)``, ``N`` unit upper triangular.

    ``diagonal`` is that of ``H + damp I``; ``dead`` columns have an input that is always zero.
    ``percdamp`` is what was asked for; ``damp`` is more after failed ``tries``.
    """

    N: Float[Tensor, "cols cols"]
    pivots: Float[Tensor, " cols"]
    diagonal: Float[Tensor, " cols"]
    damp: float
    tries: int
    dead: Bool[Tensor, " cols"]
    percdamp: float

    @property
    def U(self) -> Float[Tensor, "cols cols"]:
        return self.N * self.pivots


def find_dead(H: Float[Tensor, "cols cols"]) -> Bool[Tensor, " cols"]:
    """The columns whose input was zero in every token."""
    return H.diagonal() == 0


def check_percdamp(percdamp: float) -> None:
    """Refuse a damping that is no fraction."""
    if not 0 <= percdamp <= 1:
        raise SettingError(f"percdamp is {percdamp}", "choose a fraction from 0 to 1, such as 0.01")


def factor(H: Float[Tensor, "cols cols"], percdamp: float) -> Factor:
    """Factor ``H + d I`` with ``d = percdamp * mean(diag H)``.

    If that is not positive definite in floating point (fewer tokens than columns, duplicated
    columns), ``d`` grows tenfold until it is, up to the mean of the diagonal itself.

    Raises :class:`NumericsError` if ``H`` holds a NaN or infinity.
    """
    mean = H.diagonal().mean().item()
    if not torch.isfinite(H.sum()):
        raise NumericsError(
            "the Hessian is not finite", "look for extreme activations in the calibration text"
        )
    dead = find_dead(H)
    damp, tries = percdamp * mean, 0
    while True:
        U = H.clone()
        # A dead column is decoupled from all others and its weight is zero: any pivot will do.
        U.diagonal().masked_fill_(dead, mean if mean > 0 else 1.0).add_(damp)
        diagonal = U.diagonal().clone()
        if factor_upper(U):
            pivots = U.diagonal().clone()
            return Factor(U.div_(pivots), pivots, diagonal, damp, tries, dead, percdamp)
        if damp >= mean:
            raise NumericsError(
                "the Hessian cannot be factored at any damping",
                "look for extreme activations in the calibration text",
            )
        damp, tries = min(max(10 * damp, 1e-6 * mean), mean), tries + 1


def factor_upper(A: Float[Tensor, "cols cols"]) -> bool:
    """Overwrite a symmetric ``A = U U^T`` with its upper triangular ``U``; False if it has none.

    From the lower right corner, a block at a time: ``U22`` from ``A22``, ``U12 = A12 U22^-T``,
    and on with ``A11 - U12 U12^T``. On a CPU this beats LAPACK on the reversed matrix, because
    nearly all of it is matrix products, and it needs no reversed copies.
    """
    for stop in range(len(A), 0, -CHOLESKY_BLOCK):
        start = max(0, stop - CHOLESKY_BLOCK)
        corner, panel = A[start:stop, start:stop], A[:start, start:stop]
        L, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        corner.copy_(L.flip(0, 1))
        if info.item() or not torch.isfinite(corner.diagonal()).all():
            return False
        one = torch.eye(stop - start, dtype=A.dtype, device=A.device)
        panel.copy_(panel @ torch.linalg.solve_triangular(corner, one, upper=True).T)
        for top in range(0, start, 2 * CHOLESKY_BLOCK):  # on and above the diagonal
            rows = slice(top, min(top + 2 * CHOLESKY_BLOCK, start))
            A[rows, top:start].addmm_(panel[rows], panel[top:].T, alpha=-1)
        A[stop:, start:stop] = 0
    return True


def quick_dtype(like: Tensor) -> torch.dtype:
    """The dtype for products that need not be exact: bfloat16, where float32 is slower."""
    quick = like.dtype == torch.float32 and fast_bfloat16(like.device)
    return torch.bfloat16 if quick else like.dtype


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a bfloat16 product is faster than a float32 one: not where it is emulated."""
    if device.type == "cuda":
        return True
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and bool(native())
