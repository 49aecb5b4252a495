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

from optq.core.grid import is_int
from optq.core.precision import exact_products, quick_dtype
from optq.core.problem import Problem, check_percdamp
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
        if not (is_int(self.alpha) or isinstance(self.alpha, float)) or not math.isfinite(
            self.alpha
        ):
            raise SettingError(f"alpha is {self.alpha!r}", "choose a number, such as 0.5")
        if not isinstance(self.exclude, str | None):
            raise SettingError(f"exclude is {self.exclude!r}", "give a regular expression, or None")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise SettingError(
                f"exclude {self.exclude} is not a regular expression: {error}", "escape it"
            ) from error

    def applies(self, name: str) -> bool:
        """Whether the layer called ``name`` is not excluded."""
        return self.exclude is None or re.search(self.exclude, name) is None

    @exact_products()
    def correct(
        self,
        problem: Problem,
        weight: Float[Tensor, "rows cols"],
        drift: Float[Tensor, "cols cols"],
        of: int = 0,
    ) -> Float[Tensor, "rows cols"]:
        """``W'`` from ``W``, the problem of ``H = X^ X^^T / tokens``, and ``drift = D X^^T /
        tokens``.

        ``of``: the rows of the site, where ``weight`` has but some; each becomes what it would
        among all. The problem's factor serves where it has the same ``percdamp``. Raises
        ``NumericsError`` if ``H`` is not finite.
        """
        factored, order = problem.factor_at(self.percdamp)
        if max(of, len(weight)) < len(drift):
            shift = factored.solve(weight @ drift, order)
        else:  # fewer right-hand sides; and what follows the solve may be bfloat16, where fast
            quick = quick_dtype(weight)
            shift = (weight.to(quick) @ factored.solve(drift, order).to(quick)).to(weight.dtype)
        return torch.add(weight, shift, alpha=self.alpha)
