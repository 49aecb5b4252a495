"""The problem of a site: all that its inputs alone decide, before any weight is seen.

That is the Hessian ``H``, the columns that no token reached, the order of the sweep, and the factor
of the damped Hessian in that order. Each is made when it is first asked for, and once: the layers
of a site, error propagation and whatever else solves with ``H`` share it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.compiled import transposed
from optq.core.order import ActOrder, sweep_order
from optq.core.precision import exact_products
from optq.errors import NumericsError, SettingError

CHOLESKY_BLOCK = 128  # columns that LAPACK factors at a time: of more, by as many threads as it has
UNSEEN = 0.01  # what a column without evidence weighs in a range search, of the mean diagonal


class Problem:
    """``H`` (not damped), and what follows from it for groups of ``width`` columns.

    ``percdamp`` is the damping as a fraction of the mean of ``diag H``, ``actorder`` the order of
    the sweep: see :mod:`optq.core.order`. ``seconds`` is the time spent on the site, by stage.
    """

    def __init__(
        self,
        H: Float[Tensor, "cols cols"],
        percdamp: float = 0.0,
        actorder: ActOrder = False,
        width: int = 1,
    ) -> None:
        self.H, self.percdamp, self.actorder, self.width = H, percdamp, actorder, width
        self.seconds = {"factor": 0.0, "solve": 0.0}

    @cached_property
    def dead(self) -> Bool[Tensor, " cols"]:
        """The columns whose input was zero in every token: nothing is known of them."""
        return self.H.diagonal() == 0

    @cached_property
    def importance(self) -> Float[Tensor, "cols 1"]:
        """What each column weighs in a range search: ``diag H``; a little, where it is unknown."""
        diagonal = self.H.diagonal()
        return torch.where(self.dead, UNSEEN * diagonal.mean(), diagonal)[:, None]

    @cached_property
    def order(self) -> Int[Tensor, " cols"] | None:
        """The columns in the order of the sweep; None: as they are."""
        return sweep_order(self.H.diagonal(), self.width, self.actorder)

    @cached_property
    def places(self) -> Int[Tensor, " cols"] | None:
        """Where each column stands in :attr:`order`."""
        return None if self.order is None else torch.argsort(self.order)

    @cached_property
    def factor(self) -> Factor:
        """Of ``H``, damped, its columns in :attr:`order`. Raises as :func:`factor` does."""
        start, order = time.perf_counter(), self.order
        H = self.H if order is None else self.H[order].index_select(1, order)
        factored = factor(H, self.percdamp)
        self.seconds["factor"] += elapsed(start, H)
        return factored

    def factor_at(self, percdamp: float) -> tuple[Factor, Int[Tensor, " cols"] | None]:
        """A factor at this damping, and its columns' order: the problem's own, if it serves."""
        if percdamp == self.percdamp:
            return self.factor, self.order
        return factor(self.H, percdamp), None

    @property
    def damp(self) -> float:
        """The ``d`` of ``H + d I``; 0 where nothing was factored."""
        return self.factor.damp if "factor" in vars(self) else 0.0

    @property
    def damp_tries(self) -> int:
        """Factorizations that failed before that one."""
        return self.factor.tries if "factor" in vars(self) else 0


@dataclass(frozen=True)
class Factor:
    """``H + damp I = U U^T`` with ``U = N diag(pivots)``, ``N`` unit upper triangular.

    ``diagonal`` is that of ``H + damp I``. A dead column is decoupled from all others and counts in
    no error: its pivot is arbitrary, and ``live`` is 0 there, 1 elsewhere. ``damp`` is more than
    was asked for after failed ``tries``.
    """

    N: Float[Tensor, "cols cols"]
    pivots: Float[Tensor, " cols"]
    diagonal: Float[Tensor, " cols"]
    live: Float[Tensor, " cols"]
    damp: float
    tries: int

    @cached_property
    def squares(self) -> Float[Tensor, " cols"]:
        """What the square of each column of ``U^T miss / pivots`` adds to a damped error."""
        return self.pivots.square() * self.live

    @property
    def U(self) -> Float[Tensor, "cols cols"]:
        return self.N * self.pivots

    def solve(
        self, right: Float[Tensor, "some cols"], order: Int[Tensor, " cols"] | None
    ) -> Float[Tensor, "some cols"]:
        """``right (H + damp I)^-1``; the factor's columns stand in ``order``."""
        # From the right, and in LAPACK's order of a matrix, which is the transpose of torch's: else
        # torch copies it there and back.
        N, columns = self.N, transposed(right)
        columns = columns if order is None else columns[order]
        how = {"unitriangular": True, "left": False}
        solved = torch.linalg.solve_triangular(N.T, columns.T, upper=False, **how)
        solved = torch.linalg.solve_triangular(N, solved / self.pivots.square(), upper=True, **how)
        return solved if order is None else solved.T[torch.argsort(order)].T


def check_percdamp(percdamp: float) -> None:
    """Refuse a damping that is no fraction."""
    number = isinstance(percdamp, int | float) and not isinstance(percdamp, bool)
    if not number or not 0 <= percdamp <= 1:
        raise SettingError(
            f"percdamp is {percdamp!r}", "choose a fraction from 0 to 1, such as 0.01"
        )


@exact_products()
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
    dead = H.diagonal() == 0
    damp, tries = percdamp * mean, 0
    while True:
        U = H.clone()
        U.diagonal().masked_fill_(dead, mean if mean > 0 else 1.0).add_(damp)
        diagonal = U.diagonal().clone()
        if factor_upper(U):
            pivots = U.diagonal().clone()
            return Factor(U.div_(pivots), pivots, diagonal, (~dead).to(H.dtype), damp, tries)
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
    nearly all of it is matrix products, and it needs no reversed copies; and its bits are the same
    on any number of threads, where LAPACK's differ.
    """
    block = CHOLESKY_BLOCK if A.device.type == "cpu" else 2 * CHOLESKY_BLOCK
    for stop in range(len(A), 0, -block):
        start = max(0, stop - block)
        corner, panel = A[start:stop, start:stop], A[:start, start:stop]
        L, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        corner.copy_(L.flip(0, 1))
        if info.item() or not torch.isfinite(corner.diagonal()).all():
            return False
        one = torch.eye(stop - start, dtype=A.dtype, device=A.device)
        panel.copy_(panel @ torch.linalg.solve_triangular(corner, one, upper=True).T)
        for top in range(0, start, 4 * CHOLESKY_BLOCK):  # on and above the diagonal
            rows = slice(top, min(top + 4 * CHOLESKY_BLOCK, start))
            A[rows, top:start].addmm_(panel[rows], panel[top:].T, alpha=-1)
        A[stop:, start:stop] = 0
    return True
