"""Scales that move from activations into weights: found from the flow, and folded into norms.

A site can be smoothed where a norm makes its input and nothing but its layers reads it. No table
says which norms those are, or how they use their weights. The scout sees which module made the
tensor that a site reads; then the block runs once as it is and once with trial scales folded into
that module and out of the layers, in float32: if it computes the same, they can be. That finds
norms that multiply by ``1 + weight`` (Gemma), and refuses a tensor that a router or a gate reads
too, or the residual stream.

When a site's scales are chosen, the batches that wait there have read what the norm made before.
It makes it once more, in place: so they go on with the very bits that the written model computes,
and a run that goes on from its journal gives the same bytes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from optq.core.smoothquant import Smoothing, SmoothQuant
from optq.core.tokens import rounded
from optq.errors import ModelError
from optq.model.batch import Batch
from optq.model.blocks import Block, Site
from optq.model.inputs import Handed
from optq.model.layer import Layer
from optq.model.norm import Norm, Trial, copied
from optq.ranks import Ranks

SAMPLE = 512  # tokens that the search multiplies
FORMS: dict[str, float] = {"weight": 0.0, "1 + weight": 1.0}  # what norms multiply by

NO_NORM = "no norm makes its input"
SHARED = "others read its input too, or its norm has other work"
LOST = "its norm's input is gone when the layers run"
MANY = "its norm runs more than once"
TIED = "others have the weights of its norm, or of its layers"
ON_DISK = "its norm's weight is not one tensor on disk"


@dataclass(frozen=True)
class _Made:
    """What a module made of what, while both are there."""

    norm: Norm
    x: weakref.ref[Tensor]
    y: weakref.ref[Tensor]
    versions: tuple[int, int]

    def input(self, y: Tensor) -> Tensor | None:
        """What ``y`` was made of; None: gone, or changed since, or ``y`` is another tensor."""
        x = self.x()
        same = x is not None and self.y() is y and (x._version, y._version) == self.versions
        return x if same else None


class Smoother:
    """Smooths the sites of a run, and has solved layers round what they read.

    ``on_disk`` are names of parameters that can be written anew. ``changed`` has the parameters of
    the block under way that are other than the source's.
    """

    def __init__(
        self, quantizer: SmoothQuant, on_disk: Mapping[str, str], ranks: Ranks = Ranks()
    ) -> None:
        self.quantizer, self.on_disk, self.ranks = quantizer, on_disk, ranks
        self.changed: dict[str, Tensor] = {}
        self._made: dict[Batch, dict[nn.Module, _Made]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._norms: dict[Site, Norm] = {}
        self._entry: tuple[tuple, dict] | None = None
        self._tied: set[nn.Module] = set()

    def begin(self) -> None:
        """Another block is under way."""
        self.changed = {}
        for known in (self._made, self._calls, self._norms):
            known.clear()
        self._entry = None

    @contextmanager
    def hooks(self, blocks: Sequence[Block], model: nn.Module | None = None) -> Iterator[None]:
        """What norms make of what is noted, and what the scout enters a block with is kept.

        ``model``: what the blocks are part of.
        """
        handles: list[Any] = []
        noting: set[nn.Module] = set()
        self._tied = _tied(blocks, model)  # now: later, blocks' parameters come and go
        for block in blocks:
            for name, module in block.module.named_modules(prefix=block.name):
                weight = module._parameters.get("weight")
                if weight is None or weight.ndim != 1 or module in noting:
                    continue
                noting.add(module)
                noted = self._note(Norm(name, module))
                handles.append(module.register_forward_hook(noted, with_kwargs=True))
            handles.append(block.module.register_forward_pre_hook(self._enter, with_kwargs=True))
            for layer in block.layers:  # for good: the model is one that rounds what it reads
                layer.module.register_forward_pre_hook(_rounding(layer), with_kwargs=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.begin()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        batch = getcurrent()
        if isinstance(batch, Batch) and batch.kind == "scout":
            self._entry = copied(args), copied(kwargs)

    def _note(self, norm: Norm) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, kwargs: dict, made: Any) -> None:
            batch = getcurrent()
            given = (*args, *kwargs.values())
            if not isinstance(batch, Batch) or batch.repeats or len(given) != 1:
                return
            x = given[0]
            if batch.kind == "scout":
                self._calls[module] = self._calls.get(module, 0) + 1
            if type(x) is not Tensor or type(made) is not Tensor or _same_memory(x, made):
                return
            versions = x._version, made._version
            found = _Made(norm, weakref.ref(x), weakref.ref(made), versions)
            self._made.setdefault(batch, {})[module] = found

        return note

    def source(self, batch: Batch, site: Site, x: Tensor) -> None:
        """The scout is about to read ``x`` at a new site."""
        if not self.quantizer.smooths:
            return
        site.unsmoothed = NO_NORM
        columns = x.shape[-1]
        for made in self._made.get(batch, {}).values():
            if made.y() is x and made.norm.module.weight.shape == (columns,):
                if made.input(x) is None:
                    site.unsmoothed = LOST
                    return
                site.unsmoothed = None
                self._norms[site] = made.norm

    def look(self, block: Block, sites: Sequence[Site]) -> None:
        """The scout is through with ``block``: find out which of its sites can be smoothed.

        All ranks do what the first one finds. Errors: ``ModelError``.
        """
        if not self.quantizer.smooths:
            return
        found = self.ranks.share(lambda: self._verdicts(block, sites))
        self._entry = None
        for site, (why, offset) in zip(sites, found, strict=True):
            site.unsmoothed = why
            norm = self._norms.pop(site, None)
            if why is None and norm is not None:
                self._norms[site] = Norm(norm.name, norm.module, offset)

    def _verdicts(self, block: Block, sites: Sequence[Site]) -> list[tuple[str | None, float]]:
        """Of each site: why it cannot be smoothed, or None and its norm's ``offset``."""
        entry = self._entry
        uses = [norm.module for norm in self._norms.values()]
        why: dict[Site, str] = {}
        norms: dict[Site, Norm] = {}
        for site in sites:
            norm = self._norms.get(site)
            if norm is None or entry is None:
                why[site] = site.unsmoothed or NO_NORM  # the scout may have missed it
            elif self._calls[norm.module] > 1 or uses.count(norm.module) > 1:
                why[site] = MANY
            elif not self._tied.isdisjoint([norm.module, *(x.module for x in site.layers)]):
                why[site] = TIED
            elif not {*norm.parameters} <= {"weight", "bias"} or not all(
                f"{norm.name}.{name}" in self.on_disk for name in norm.parameters
            ):
                why[site] = ON_DISK
            else:
                norms[site] = norm
        if norms and entry is not None:
            with Trial(block, *entry) as trial:
                if not trial.same(norms):  # in the common case all are of the first form
                    for site, norm in list(norms.items()):
                        forms = [Norm(norm.name, norm.module, each) for each in FORMS.values()]
                        fit = [form for form in forms if trial.same({site: form})]
                        if fit:
                            norms[site] = fit[0]
                        else:
                            why[site] = SHARED
        return [(why.get(x), norms[x].offset if x in norms else 0.0) for x in sites]

    def smooth(self, site: Site, here: Sequence[Batch], device: torch.device) -> None:
        """Before ``site`` is solved: choose its scales, and have the batches read what the norm
        makes then. Its weights are scaled where they are solved.
        """
        norm = self._norms.get(site)
        if norm is None:
            return
        largest, sample = self._seen([b.input for b in here], device)  # type: ignore[misc]
        if not largest.isfinite().all():
            return  # which the sums of the site will say of what sample it is
        weight = torch.cat([layer.weight.to(sample.dtype) for layer in site.layers])

        def choose() -> Smoothing:
            found = self.quantizer.smoothing(weight, largest, sample)
            return found if found.scales is None else replace(found, scales=found.scales.cpu())

        found = self.ranks.share(choose)  # sums end in other bits where threads are others
        site.smoothing = found
        if found.scales is None:
            return
        values, exact = norm.folded(found.scales.to(device))
        site.scales = exact
        for name, value in values.items():
            norm.parameters[name].data = value
            self.changed[f"{norm.name}.{name}"] = value
        for batch in here:
            self._again(norm, batch, device)

    def _again(self, norm: Norm, batch: Batch, device: torch.device) -> None:
        assert isinstance(batch.input, Handed)
        y = batch.input.x
        made = self._made.get(batch, {}).get(norm.module)
        x = None if made is None else made.input(y)
        if x is None:
            raise ModelError(
                f"{norm.name} makes another tensor for some samples than for others",
                "add --alpha off, and report this model",
            )
        y.copy_(norm.module.forward(x.to(device)))

    def _seen(self, inputs: Sequence[Handed], device: torch.device) -> tuple[Tensor, Tensor]:
        """The largest of each channel, and a sample of tokens, of all ranks' batches."""
        batches = self.ranks.total(len(inputs))
        each = max(1, SAMPLE // max(batches, 1))
        tops, rows = [], []
        for handed in inputs:
            x = handed.inputs
            tops.append(x.abs().amax(0).float().cpu())
            # Any token as likely as another: at even steps they all stood at the same few places.
            chance = torch.Generator().manual_seed(handed.first_sample)
            some = torch.randperm(len(x), generator=chance)[:each]
            rows.append(x[some.to(x.device)].cpu())
        told = self.ranks.gather((tops, rows), "smoothing")
        tops = [top for own, _ in told for top in own]
        sample = torch.cat([row for _, own in told for row in own]).to(device)
        sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        return torch.stack(tops).amax(0).to(device, sample.dtype), sample


def _tied(blocks: Sequence[Block], model: nn.Module | None) -> set[nn.Module]:
    """The modules with a parameter that another block has too, or the model outside of blocks.

    A block's trial says nothing of what such a parameter does there.
    """
    places = [list(block.module.modules()) for block in blocks]
    if model is not None:
        inside = {block.module for block in blocks}
        places.append([module for _, module in model.named_modules(memo=inside)])
    held: Counter[nn.Parameter] = Counter()
    for modules in places:
        held.update({x for m in modules for x in m._parameters.values() if x is not None})
    every = (module for modules in places for module in modules)
    return {m for m in every if any(held[x] > 1 for x in m.parameters(recurse=False))}


def _rounding(layer: Layer) -> Callable[..., Any]:
    """A hook behind the one that pauses: what the layer reads, once it is solved, has 8 bits."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if not layer.solved:
            return None
        if args:
            return (rounded(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: rounded(kwargs[name])}

    return hook


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
