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
from jaxtyping import Float
from torch import Tensor

from optq.core.hessian import check_percdamp, factor
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
        cross: Float[Tensor, "cols cols"],
    ) -> Float[Tensor, "rows cols"]:
        """``W'`` from ``W``, ``H = X^ X^^T / tokens`` and ``cross = X X^^T / tokens``.

        ``D X^^T`` is taken as ``cross - H``. Raises ``NumericsError`` if ``H`` is not finite.
        """
        U = factor(H, self.percdamp).U
        # (H + d I)^-1 = U^-T U^-1, applied from the right to the product with W: two solves.
        shift = (weight @ (cross - H)).T
        shift = torch.linalg.solve_triangular(U, shift, upper=True)
        shift = torch.linalg.solve_triangular(U.T, shift, upper=False)
        return torch.add(weight, shift.T, alpha=self.alpha)
