"""The baselines of pruning, which move no other weight: by magnitude, and Wanda.

Magnitude removes the smallest weights of each row. Wanda (Sun, Liu, Bair, Kolter, ICLR 2024)
removes those of the least ``|w| sqrt(H_jj)``: a weight that meets large inputs stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from optq.core.grid import Storage
from optq.core.problem import Problem
from optq.core.pruning import UNSEEN, Pruner
from optq.core.rounding import working_copy
from optq.core.solution import Solution
from optq.core.weight import group_index


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Remove the smallest weights; options as in :class:`optq.core.pruning.Pruner`."""

    sparsity: float | str = 0.5
    wbits: int | None = None
    groupsize: int = -1
    sym: bool = True
    mse: bool = False
    percdamp = 0.0  # no option: nothing is damped

    def _saliency(
        self, W: Float[Tensor, "cols rows"], problem: Problem
    ) -> Float[Tensor, "cols rows"]:
        return W.abs()

    def _solve(
        self, problem: Problem, weight: Tensor, aim: Tensor | None, storage: Storage
    ) -> Solution:
        W = working_copy(weight)
        baseline = self.magnitude(W, problem, storage)
        target = W if aim is None else working_copy(aim)
        kept = target * self.pattern.keep(self._saliency(W, problem))
        found = self.rounded(kept, problem, storage)
        if self.wbits is None:
            return self.pruned(W, kept, problem, baseline, storage)
        group = group_index(len(W), self.grid.width(len(W)), W.device)
        found.miss.add_(W - kept)
        return self.coded(W, found, group, problem, baseline)


@dataclass(frozen=True)
class Wanda(Magnitude):
    """Remove the weights that the layer's output feels least, each by itself."""

    def _saliency(
        self, W: Float[Tensor, "cols rows"], problem: Problem
    ) -> Float[Tensor, "cols rows"]:
        diagonal = problem.H.diagonal()
        seen = diagonal.where(~problem.dead, UNSEEN * diagonal.mean())
        return W.abs() * seen.sqrt()[:, None]
