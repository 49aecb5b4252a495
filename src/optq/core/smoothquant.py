"""SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth, Han, ICML 2023): weights and activations in 8 bits.

A token's int8 scale is set by its largest channel, and in large models a few channels are tens of
times larger than the others: what the others say is then rounded away. Weights have no such
columns. So each channel ``j`` is divided, and its column multiplied, by

    s_j = max|X_j|^a / max|W_j|^(1-a)

(equation 4), which leaves the product as it is, and moves the difficulty from the one to the other.
The division costs nothing where a norm makes the activations: its weights are divided
(:mod:`optq.model.smoothing`).

Departures from the paper:

1. The strength ``a`` is searched at each site by the error of its quantized product, no smoothing
   among the candidates; the paper has one ``a`` for a model.
2. Weights are rounded by GPTQ, on the smoothed inputs; to nearest where that is asked for.
3. A channel, or a column, that is zero is not scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from optq.core.gptq import GPTQ
from optq.core.grid import Storage
from optq.core.problem import Problem
from optq.core.rtn import RTN
from optq.core.solution import Solution
from optq.core.solver import Solver
from optq.core.tokens import ABITS, HALF, HIGH, LOW, rounded
from optq.core.weight import LayerScheme
from optq.errors import SettingError

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ROUNDING = ("gptq", "rtn")
LIMIT = 1e5  # of a scale, and of one over it


@dataclass(frozen=True)
class Smoothing:
    """What was chosen for a site: ``alpha``, None for no smoothing, and the scales of columns.

    ``error`` is that of the product with both sides in 8 bits, relative to its output's energy on
    the sample, in four digits; ``plain`` the same without smoothing.
    """

    alpha: float | None
    scales: Float[Tensor, " cols"] | None
    error: float
    plain: float


@dataclass(frozen=True)
class SmoothQuant(Solver):
    """Weights in 8 bits with one scale to a row, activations in 8 bits with one to a token.

    ``alpha``: the strength of smoothing, between 0 and 1; None: searched at each site; "off": none
    (plain W8A8). ``rounding``: "gptq", or "rtn" (to nearest). ``percdamp``: of GPTQ. Errors:
    ``SettingError``.
    """

    wbits: int = 8
    abits: int = ABITS
    alpha: float | str | None = None
    rounding: str = "gptq"
    percdamp: float = 0.01
    groupsize = -1  # no options: what readers multiply in integers has one scale to a row
    sym = True
    mse = True

    def __post_init__(self) -> None:
        for name, value in (("wbits", self.wbits), ("abits", self.abits)):
            if isinstance(value, bool) or value != ABITS:
                raise SettingError(
                    f"{name} is {value!r}, and weights and activations are multiplied in 8 bits",
                    "choose 8 for both; fewer bits for weights alone are --method gptq's",
                )
        if self.rounding not in ROUNDING:
            raise SettingError(f"rounding is {self.rounding!r}", f"choose {' or '.join(ROUNDING)}")
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha not in (None, "off") and not (number and 0 <= float(self.alpha) <= 1):
            raise SettingError(f"alpha is {self.alpha!r}", 'choose 0 to 1, or "off"')
        super().__post_init__()

    @property
    def smooths(self) -> bool:
        return self.alpha != "off"

    @cached_property
    def own(self) -> Solver:
        """What rounds the weights."""
        if self.rounding == "rtn":
            return RTN(self.wbits)
        return GPTQ(self.wbits, percdamp=self.percdamp)

    def scheme(self) -> LayerScheme:
        return LayerScheme(self.wbits, -1, True, abits=self.abits)

    def problem(self, H: Float[Tensor, "cols cols"]) -> Problem:
        return self.own.problem(H)

    def _solve_together(
        self,
        problems: Sequence[Problem],
        weights: Sequence[Tensor],
        aims: Sequence[Tensor | None],
        storage: Storage,
    ) -> list[Solution]:
        return self.own._solve_together(problems, weights, aims, storage)

    def _solve(self, *arguments: Any) -> Solution:
        return self.own._solve(*arguments)

    def smoothing(
        self,
        weight: Float[Tensor, "rows cols"],
        largest: Float[Tensor, " cols"],
        sample: Float[Tensor, "tokens cols"],
    ) -> Smoothing:
        """The scales of a site: ``weight`` are its layers' stacked rows, ``largest`` is ``max|X|``
        of each channel over all calibration tokens, ``sample`` some of these, which the search
        multiplies.
        """
        strongest = weight.abs().amax(0)
        wanted = sample @ weight.T
        energy = float(wanted.double().square().sum()) or 1.0

        def error(scales: Tensor | None) -> float:
            x, w = (sample, weight) if scales is None else (sample / scales, weight * scales)
            made = rounded(x) @ _nearest(w).T
            found = float((made - wanted).double().square().sum()) / energy
            return float(f"{found:.4g}")  # more depends on the number of threads

        plain = error(None)
        best = Smoothing(None, None, plain, plain)
        for alpha in ALPHAS if self.alpha is None else (float(self.alpha),):
            scales = smoothing_scales(largest, strongest, alpha)
            found = error(scales)
            if found < best.error or self.alpha is not None:
                best = Smoothing(alpha, scales, found, plain)
        return best


def smoothing_scales(
    largest: Float[Tensor, " cols"], strongest: Float[Tensor, " cols"], alpha: float
) -> Float[Tensor, " cols"]:
    """``max|X_j|^a / max|W_j|^(1-a)``; 1 where either is zero."""
    scales = largest**alpha / strongest ** (1 - alpha)
    alive = (largest > 0) & (strongest > 0)
    return torch.where(alive, scales.clamp(1 / LIMIT, LIMIT), torch.ones_like(scales))


def _nearest(weight: Tensor) -> Tensor:
    """Rounded to 8 bits with one scale to a row."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / HALF
    return (weight / scale).round_().clamp_(LOW, HIGH).mul_(scale)
