"""Quantization error propagation (QEP): aim at the full-precision layer's output.

The inputs ``X^`` of a layer in a model quantized so far differ from the inputs ``X`` of the
full-precision model by ``D = X - X^``. With ``H^ = X^ X^^T`` the weights

    W' = W + alpha * W (D X^^T) (H^ + lambda * mean(diag H^) * I)^-1

make up for a part ``alpha`` of what ``D`` does to the output ``W X``, as far as ``X^`` can
express it; ``W'`` is quantized against ``H^`` in the place of ``W``. ``D = 0`` changes nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optq.core.hessian import Factor, check_percdamp, factor, quick_dtype
from optq.errors import SettingError


@dataclass(frozen=True)
class QEP:
    """``alpha``: the part of the error to make up for; ``percdamp``: the ``lambda`` above.

    ``exclude``: a regular expression; layers whose name it matches somewhere aim at their own
    weights.
    """

    alpha: float = 0.5
    percdamp: float = 0.01
    exclude: str | None = None

    def __post_init__(self) -> None:
        check_percdamp(self.percdamp)
        if not math.isfinite(self.alpha):
            raise SettingError(f"alpha is {self.alpha}", "choose a number, such as 0.5")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise SettingError(
                f"exclude {self.exclude} is not a regular expression: {error}", "escape it"
            ) from error

    def applies(self, name: str) -> bool:
        """Whether the layer called ``name`` is not excluded."""
        return self.exclude is None or re.search(self.exclude, name) is None

    def correct(
        self,
        weight: Float[Tensor, "rows cols"],
        H: Float[Tensor, "cols cols"],
        drift: Float[Tensor, "cols cols"],
        factored: Factor | None = None,
        order: Int[Tensor, " cols"] | None = None,
    ) -> Float[Tensor, "rows cols"]:
        """``W'`` from ``W``, ``H = X^ X^^T / tokens`` and ``drift = D X^^T / tokens``.

        ``factored``, of ``H[order][:, order]``, is used if it was asked for the same ``percdamp``.
        Raises ``NumericsError`` if ``H`` is not finite.
        """
        if factored is None or factored.percdamp != self.percdamp:
            factored, order = factor(H, self.percdamp), None
        if len(weight) < len(H):
            shift = _solve(factored, order, weight @ drift)
        else:  # fewer right-hand sides; and what follows the solve may be bfloat16, where fast
            quick = quick_dtype(weight)
            shift = (weight.to(quick) @ _solve(factored, order, drift).to(quick)).to(weight.dtype)
        return torch.add(weight, shift, alpha=self.alpha)


def _solve(factored: Factor, order: Tensor | None, right: Float[Tensor, "some cols"]) -> Tensor:
    """``right (H + d I)^-1``, through ``N diag(pivots)^2 N^T = H + d I``."""
    N, columns = factored.N, right.T if order is None else right.T.contiguous()[order]
    solved = torch.linalg.solve_triangular(N, columns, upper=True, unitriangular=True)
    solved = solved / factored.pivots.square()[:, None]
    solved = torch.linalg.solve_triangular(N.T, solved, upper=False, unitriangular=True)
    return (solved if order is None else solved[torch.argsort(order)]).T
