"""A norm that takes scales into its weights, and a block that shows whether it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optq.model.batch import handed_on
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
    """A block in float32, as a context, run with and without trial scales."""

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
        self.plain = self._run()
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
        first = next((x for x in (*self.args, *self.kwargs.values()) if _fits(x, made)), None)
        base = self.plain if first is None else self.plain - first
        return bool((made - self.plain).norm() <= SAME * base.norm())

    def _run(self) -> Tensor:
        args, kwargs = copied(self.args), copied(self.kwargs)
        return handed_on(self.block.module(*args, **kwargs)).double()


def _fits(value: Any, made: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == made.shape


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
