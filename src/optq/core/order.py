"""The order in which a sweep takes the columns.

Columns of large activations first (act-order) lowers the error: what they miss, many columns after
them can still make up for. Three ways to combine it with groups:

* by falling ``diag H``, over all columns: groups that are fitted in mid-sweep then follow the
  order, and a file needs ``g_idx`` to say which column is in which;
* the same with static groups, whose grids are fitted before the sweep;
* ``"group"``: the groups stay consecutive columns, are swept by falling largest ``diag H``, and
  each one's columns by falling ``diag H``. Grids are fitted in mid-sweep, and a file needs
  nothing. A last group of fewer columns stays last, so that groups start at multiples of their
  width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

ActOrder = bool | str  # True, False or "group"


def sweep_order(
    diagonal: Float[Tensor, " cols"], width: int, actorder: ActOrder
) -> Int[Tensor, " cols"] | None:
    """The columns in the order of the sweep, for groups of ``width``; None: as they are.

    Equal columns, and equal groups, keep their own order.
    """
    if not actorder:
        return None
    order = torch.argsort(diagonal, descending=True, stable=True)
    if actorder != "group":
        return order
    largest = torch.stack([part.amax() for part in diagonal.split(width)])
    if len(diagonal) % width:
        largest[-1] = -torch.inf
    rank = torch.argsort(torch.argsort(largest, descending=True, stable=True))
    return order[torch.argsort(rank[order // width], stable=True)]
