"""A norm that takes scales into its weights, and a block that shows whether it may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optq.boundary import library
from optq.errors import ModelError
from optq.model.blocks import Block, Site

TRIAL = 4.0  # scales that are tried: this or one over it
SAME = 1e-3  # of what the block adds to the hidden states
APART = 2.0  # what rounding a norm's new weight may make of a scale, at most


@dataclass(frozen=True)
class Norm:
    """The module that makes a site's input; ``offset`` is what it adds to its weight."""

    name: str
    module: nn.Module
    offset: float = 0.0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters(recurse=False))

    def folded(self, scales: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """New values of its parameters, and the scales that these stand for, which float64 has.

        They are rounded to the parameters' dtype, so the scales are what rounding leaves of those
        asked for; a channel where that is far off, or the weight zero, keeps its own.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        old = weight.detach().double() + self.offset
        value = (old / scales.double() - self.offset).to(weight.dtype)
        new = value.double() + self.offset
        exact = old / new
        ratio = exact / scales
        good = new.isfinite() & (new != 0) & (old != 0) & (ratio > 1 / APART) & (ratio < APART)
        exact = torch.where(good, exact, 1.0)
        values = {"weight": torch.where(good, value, weight.detach())}
        for name, parameter in self.parameters.items():
            if name != "weight":  # a bias
                values[name] = (parameter.detach().double() / exact).to(parameter.dtype)
        return values, exact


class Trial:
    """A block in float32, as a context, run with and without trial scales.

    Errors: ``ModelError`` where it cannot be run so.
    """

    def __init__(self, block: Block, args: tuple, kwargs: dict) -> None:
        self.block, self.args, self.kwargs = block, args, kwargs
        module = block.module
        self._tensors = {*module.parameters(), *module.buffers()}
        self._kept: dict[Tensor, Tensor] = {}

    def __enter__(self) -> Trial:
        for each in self._tensors:
            self._kept[each] = each.data
            each.data = copied(each.data, wide=True)
        self.args, self.kwargs = copied(self.args, wide=True), copied(self.kwargs, wide=True)
        try:
            self.plain = self._run()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for each, data in self._kept.items():
            each.data = data

    def same(self, norms: Mapping[Site, Norm]) -> bool:
        """Whether the block computes the same with scales in these norms, out of the layers."""
        before = {each: each.data for each in self._tensors}
        try:
            for site, norm in norms.items():
                columns = site.layers[0].shape[1]
                generator = torch.Generator().manual_seed(columns)
                signs = torch.randint(2, (columns,), generator=generator) * 2 - 1
                values, exact = norm.folded((TRIAL**signs).to(norm.parameters["weight"].device))
                for name, value in values.items():
                    norm.parameters[name].data = value
                for parameter in {layer.parameter for layer in site.layers}:
                    parameter.data = parameter.data.clone()
                for layer in site.layers:
                    layer.weight.mul_(exact)
            made = self._run()
        finally:
            for each, data in before.items():
                each.data = data
        given = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]
        return len(made) == len(self.plain) and all(map(partial(_alike, given), made, self.plain))

    def _run(self) -> list[Tensor]:
        args, kwargs = copied(self.args), copied(self.kwargs)
        name = self.block.name
        with library(ModelError, f"{name} cannot be tried in float32", "add --alpha off"):
            return [*_tensors(self.block.module(*args, **kwargs))]


def _tensors(made: Any) -> Iterator[Tensor]:
    """All that a block returns, in float64."""
    if isinstance(made, Tensor):
        yield made.double()
    elif isinstance(made, list | tuple | dict):
        for each in made.values() if isinstance(made, dict) else made:
            yield from _tensors(each)


def _alike(given: Sequence[Tensor], made: Tensor, plain: Tensor) -> bool:
    """By what was added to a tensor of that shape among those given: hidden states."""
    first = next((x for x in given if x.shape == plain.shape), 0.0)
    apart = (made - plain).masked_fill(made == plain, 0)  # both may be infinite
    return bool(apart.norm() <= SAME * (plain - first).norm())


def copied(value: Any, wide: bool = False) -> Any:
    """Its tensors cloned; ``wide``: those of numbers in float32 at least."""
    if isinstance(value, Tensor):
        if wide and value.is_floating_point():
            return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(each, wide) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(each, wide) for each in value)
    return value
