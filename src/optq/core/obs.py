"""OBS, Optimal Brain Surgeon (Hassibi & Stork, NeurIPS 1992): exact, greedy and slow.

Each row picks its own order: remove the weight ``p`` that costs least,

    L_p = w_p^2 / (2 [H^-1]_pp)

move the others by ``dw = -w_p / [H^-1]_pp * H^-1[:, p]``, drop ``p`` from ``H^-1`` as
:mod:`optq.core.obq` does, repeat. ``L_p`` is half of what the (damped) error rises by. What is left
in the end is the least squares that the choice allows. Time is O(rows * removed * cols^2) and
memory O(cols^2) for each row at work, so it serves small layers and as the reference that
:mod:`optq.core.sparsegpt` is held against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optq.core.grid import Storage
from optq.core.obq import ENTRIES_AT_ONCE, eliminate
from optq.core.problem import Problem
from optq.core.pruning import UNSEEN, Pattern, Pruner
from optq.core.rounding import working_copy
from optq.core.solution import Solution
from optq.errors import SettingError


@dataclass(frozen=True)
class OBS(Pruner):
    """Options as in :class:`optq.core.pruning.Pruner`; it removes weights, and rounds none."""

    sparsity: float | str = 0.5
    wbits: int | None = None
    percdamp: float = 0.01
    groupsize = -1
    sym = True
    mse = False

    def __post_init__(self) -> None:
        if self.wbits is not None:
            raise SettingError(
                "obs removes weights, and rounds none", "leave out wbits, or use sparsegpt"
            )
        super().__post_init__()

    def _solve(
        self, problem: Problem, weight: Tensor, aim: Tensor | None, storage: Storage
    ) -> Solution:
        factored = problem.factor
        U = factored.U
        inverse = torch.cholesky_inverse(U.flip(0, 1)).flip(0, 1)
        W = working_copy(weight)
        target = W if aim is None else working_copy(aim)
        at_once = max(1, ENTRIES_AT_ONCE // len(W) ** 2)
        parts = target.T.split(at_once)
        values = torch.cat(
            [remove(inverse, part, self.pattern, factored.live)[0] for part in parts]
        )
        baseline = self.magnitude(W, problem, storage)
        return self.pruned(W, values.T.contiguous(), problem, baseline, storage)


def remove(
    inverse: Float[Tensor, "cols cols"],
    W: Float[Tensor, "rows cols"],
    pattern: Pattern,
    live: Float[Tensor, " cols"],
) -> tuple[Float[Tensor, "rows cols"], Int[Tensor, "rows removed"], Float[Tensor, "rows removed"]]:
    """Each row without as many weights as the pattern says: what is left; which were removed, in
    turn; and half of what each cost. Weights of columns that are not ``live`` cost nothing, and go
    first, the smallest before the others.
    """
    W = W.clone(memory_format=torch.contiguous_format)
    rows, columns = W.shape
    each, width = torch.arange(rows, device=W.device), pattern.of or columns
    most = width - pattern.kept if pattern.of else int(pattern.share * columns + 1e-9)
    inverses = inverse.expand(rows, columns, columns).clone(memory_format=torch.contiguous_format)
    gone = torch.zeros_like(W, dtype=torch.bool)
    removed = torch.zeros(rows, columns // width, dtype=torch.long, device=W.device)
    order, costs = [], []
    for _ in range(most * (columns // width)):
        full = (removed >= most).repeat_interleave(width, 1)
        cost = live.clamp(min=UNSEEN) * W.square() / (2 * inverses.diagonal(dim1=1, dim2=2))
        p = cost.masked_fill_(gone | full, torch.inf).argmin(1)
        order.append(p)
        costs.append(cost[each, p])
        W -= (W[each, p] / inverses[each, p, p])[:, None] * inverses[each, :, p]
        gone[each, p] = True
        W[gone] = 0  # exactly
        removed[each, p // width] += 1
        eliminate(inverses, p)
    if not order:
        return W, gone[:, :0].long(), W[:, :0]
    return W, torch.stack(order, 1), torch.stack(costs, 1)
