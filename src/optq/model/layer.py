"""One linear map of a model, wherever its weight is kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(eq=False)
class Layer:
    """One linear map inside a block; ``name`` is its dotted name in the model.

    Of experts in one parameter ``[experts, ..]`` it is one projection of one ``expert``: some
    ``rows`` of that slice.
    """

    name: str
    module: nn.Module
    transposed: bool  # Conv1D keeps [columns, rows]
    attribute: str = "weight"
    expert: int | None = None
    rows: slice | None = None
    wbits: int | None = None  # of its own, where that is not the run's
    calls: int = 0  # in one forward, at most; a layer belongs to its first call
    solved: bool = False

    @property
    def conv1d(self) -> bool:
        """Whether it is a module whose class readers may not know."""
        return self.transposed and self.expert is None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def weight(self) -> Tensor:
        """``[rows, columns]``: a view of the parameter."""
        return self.part(self.whole)

    @property
    def whole(self) -> Tensor:
        """The parameter's values; of experts, this one's slice."""
        return self.parameter.data if self.expert is None else self.parameter.data[self.expert]

    def of(self, every: Tensor) -> Tensor:
        """``[rows, columns]`` of a tensor like the parameter: a view."""
        return self.part(every if self.expert is None else every[self.expert])

    def part(self, whole: Tensor) -> Tensor:
        """``[rows, columns]`` of a tensor like :attr:`whole`: a view."""
        weight = whole.T if self.transposed else whole
        return weight if self.rows is None else weight[self.rows]

    @property
    def shape(self) -> tuple[int, int]:
        sizes = self.parameter.shape[0 if self.expert is None else 1 :]  # there may be thousands
        rows, columns = sizes[::-1] if self.transposed else sizes
        return rows if self.rows is None else len(range(*self.rows.indices(rows))), columns

    def put(self, weight: Tensor) -> None:
        """Replace the weight in place: its strides, and so the bits of each product, stay."""
        self.weight.copy_(weight)
