"""What every method of quantizing is: options, and what it does with a problem."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from optq.core.clock import elapsed
from optq.core.compiled import transposed
from optq.core.grid import Grid, IntegerGrid, Storage
from optq.core.precision import exact_products
from optq.core.problem import Problem, check_percdamp
from optq.core.solution import Solution
from optq.core.weight import LayerScheme


class Solver(ABC):
    """A frozen dataclass with these options among its own; bad ones are refused when it is made.

    Errors: ``SettingError``.
    """

    wbits: int
    groupsize: int
    sym: bool
    mse: bool
    percdamp: float

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  refuses bad options here, not an hour later
        check_percdamp(self.percdamp)

    @property
    def grid(self) -> Grid:
        """The values that weights can take."""
        return IntegerGrid(self.wbits, self.groupsize, self.sym, self.mse)

    def at(self, wbits: int | None) -> Solver:
        """The same with another number of bits; None: as it is."""
        return self if wbits is None else replace(self, wbits=wbits)  # type: ignore[type-var]

    def scheme(self) -> LayerScheme:
        """What a file says of each layer."""
        return LayerScheme(self.wbits, self.groupsize, self.sym)

    def problem(self, H: Float[Tensor, "cols cols"]) -> Problem:
        """The problem of a site whose Hessian, not damped, is ``H``."""
        return Problem(H, self.percdamp)

    def solve(
        self,
        problem: Problem,
        weight: Float[Tensor, "rows cols"],
        aim: Float[Tensor, "rows cols"] | None = None,
        storage: Storage = Storage(),
    ) -> Solution:
        """Codes for ``weight``: one layer, or all layers of a site stacked.

        ``problem`` is what :meth:`problem` makes of the site's Hessian. ``aim`` is what the codes
        aim at in the place of ``weight``: see :mod:`optq.core.qep`. Errors, the promise about
        rounding, and grids fitted beforehand stay those of ``weight``. Works in float32, or
        float64 where both are float64. Raises ``NumericsError`` if ``H`` is not finite.
        """
        return self.solve_together([problem], [weight], [aim], storage)[0]

    @exact_products()
    def solve_together(
        self,
        problems: Sequence[Problem],
        weights: Sequence[Float[Tensor, "rows cols"]],
        aims: Sequence[Float[Tensor, "rows cols"] | None],
        storage: Storage = Storage(),
    ) -> list[Solution]:
        """The same for weights of one shape, each with a problem of its own, as experts are.

        Their codes are those that each would get by itself, but for the last bits of sums.
        """
        start, known = time.perf_counter(), sum(sum(p.seconds.values()) for p in problems)
        solutions = self._solve_together(problems, weights, aims, storage)
        seconds = elapsed(start, solutions[-1].error)
        seconds -= sum(sum(p.seconds.values()) for p in problems) - known  # have their own clock
        for problem in problems:
            problem.seconds["solve"] += seconds / len(problems)
        return solutions

    def _solve_together(
        self,
        problems: Sequence[Problem],
        weights: Sequence[Tensor],
        aims: Sequence[Tensor | None],
        storage: Storage,
    ) -> list[Solution]:
        each = zip(problems, weights, aims, strict=True)
        return [self._solve(problem, weight, aim, storage) for problem, weight, aim in each]

    @abstractmethod
    def _solve(
        self, problem: Problem, weight: Tensor, aim: Tensor | None, storage: Storage
    ) -> Solution: ...

    def _solution(
        self,
        codes: UInt8[Tensor, "cols rows"],
        scale: Float[Tensor, "groups rows"],
        zero: Float[Tensor, "groups rows"],
        g_idx: Int[Tensor, " cols"],
        error: Float[Tensor, " rows"],
        rtn_error: Float[Tensor, " rows"],
    ) -> Solution:
        """From tensors that are held transposed."""
        return Solution(
            wbits=self.wbits,
            codes=transposed(codes),
            scales=scale.T.contiguous(),
            zeros=zero.to(torch.uint8).T.contiguous(),
            g_idx=g_idx,
            grid=self.grid,
            error=error,
            rtn_error=rtn_error,
            fell_back=torch.zeros_like(error, dtype=torch.bool),
        )
