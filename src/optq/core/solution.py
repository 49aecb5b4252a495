"""What a solver may aim at, and what it returns: a quantized weight, and its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from optq.core.hessian import Factor
from optq.core.weight import QuantizedWeight

# Weights to aim at in the place of the layer's own, given the factor of ``H[order][:, order]`` and
# ``order``, where the solver has them.
Aim = Callable[[Factor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Solution(QuantizedWeight):
    """One layer, or the stacked layers of one site, on their grids.

    ``error`` is ``(W - Q) H (W - Q)^T`` row by row with ``H`` not damped: the mean squared output
    error per token; ``rtn_error`` the same of round-to-nearest on a grid with the same options.
    """

    error: Float[Tensor, " rows"]
    rtn_error: Float[Tensor, " rows"]
    damp: float = 0.0  # the d of H + d I that was used
    damp_tries: int = 0  # factorizations that failed before it
    dead: int = 0  # input columns that are always zero
    fallback_rows: int = 0  # rows where rounding was better than the sweep
    polish_gain: float = 0.0  # the part of the error, on what was solved for, that polish took
    seconds: dict[str, float] = field(default_factory=dict)  # factor, solve, polish

    def split(self, rows: list[int]) -> list[Solution]:
        """The solutions of the stacked layers, which have so many rows each."""
        parts, start = [], 0
        for count in rows:
            part = slice(start, start + count)
            start += count
            parts.append(
                replace(
                    self,
                    codes=self.codes[part],
                    scales=self.scales[part],
                    zeros=self.zeros[part],
                    error=self.error[part],
                    rtn_error=self.rtn_error[part],
                )
            )
        return parts
