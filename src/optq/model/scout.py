"""A forward of a model without weights: which layers share a site, and what a batch holds where.

On the meta device tensors have shapes and no values, so a forward of the whole model costs only the
calls. The batch that goes ahead in a run (:mod:`optq.model.sites`) goes through it alone, and at
each of its pauses what is alive of the tensors it has made is what a paused batch holds. A block
that is like an earlier one but for its number is not gone through: it gives what that one gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from optq.boundary import library
from optq.errors import ModelError
from optq.model.batch import Batch
from optq.model.blocks import Block, Site
from optq.model.experts import Bank
from optq.model.layer import Layer
from optq.model.sites import Sites


@dataclass(frozen=True)
class Held:
    """Bytes of activations of one sample.

    ``between`` blocks, ``paused`` inside one at most, and ``running``, the most that there is at a
    time. ``experts`` are those that a token goes to.
    """

    between: int
    paused: int
    running: int
    experts: int = 1


def scout(model: Any, blocks: list[Block], seqlen: int) -> tuple[dict[Block, list[Site]], Held]:
    """The sites of each block, in the order in which they are solved, and what a sample holds.

    ``model`` is on the meta device. Raises :class:`ModelError` where its forward asks for values,
    or does not go through its blocks once, in order. Layers that are never called have no site.
    """
    alive = _Alive([*model.parameters(), *model.buffers()])
    sites = _Ahead(model, blocks, alive)
    found: dict[Block, list[Site]] = {}
    between = 0
    ids = torch.zeros(1, seqlen, dtype=torch.int64, device="meta")
    batch = Batch(lambda ids: model(input_ids=ids, use_cache=False), ids, 0, "scout")
    cause, remedy = "the model does not run without values", "its sites are found in the run"
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        like = stack.enter_context(_short(blocks, alive))
        stack.enter_context(sites.hooks())
        stack.callback(batch.unwind)
        stack.enter_context(alive)
        stack.enter_context(_Fused())
        stack.enter_context(library(ModelError, cause, remedy))
        batch.switch()
        while (block := batch.before) is not None and block not in found:
            between = max(between, alive.bytes())
            sites.begin(block)
            batch.switch()
            found[block] = sites.sites(block)
            if first := like.get(block):
                found[block] = _same_sites(block, first, found[first])
    if len(found) != len(blocks) or batch.before:
        raise ModelError("the model does not go through its blocks once", remedy)
    paused = max(sites.paused, between)
    return found, Held(between, paused, max(alive.most, paused), sites.experts)


def _same_sites(block: Block, other: Block, sites: list[Site]) -> list[Site]:
    own = dict(zip(other.layers, block.layers, strict=True))
    banks = dict(zip(other.banks, block.banks, strict=True))
    return [
        Site(
            block,
            [own[layer] for layer in site.layers],
            site.place,
            banks[site.bank] if site.bank else None,
            [[own[layer] for layer in layers] for layers in site.experts],
        )
        for site in sites
    ]


@contextmanager
def _short(blocks: list[Block], alive: _Alive) -> Iterator[dict[Block, Block]]:
    """Inside, each block that is like an earlier one only gives what that gave; which ones are."""
    first: dict[Any, Block] = {}
    like: dict[Block, Block] = {}
    given: dict[Block, Any] = {}
    for block in blocks:
        other = first.setdefault(_kind(block), block)
        if other.module is not block.module:
            like[block] = other
    with ExitStack() as stack:
        for other in {*like.values()}:

            def keep(module: Any, args: Any, output: Any, other: Block = other) -> None:
                given[other] = tree_map_only(Tensor, alive.aside, output)

            stack.callback(other.module.register_forward_hook(keep).remove)
        for block, other in like.items():

            def again(*args: Any, other: Block = other, **named: Any) -> Any:
                return tree_map_only(Tensor, torch.empty_like, given[other])

            block.module.forward = again
            stack.callback(delattr, block.module, "forward")
        yield like


def _kind(block: Block) -> tuple[Any, ...]:
    """What two blocks have in common that differ in their number only: modules and settings."""
    parts: list[Any] = [[layer.name.removeprefix(block.name) for layer in block.layers]]
    for name, module in block.module.named_modules():
        shapes = [(own, [*p.shape]) for own, p in module.named_parameters(recurse=False)]
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | str | float)
            or (isinstance(value, int) and value != block.index)
        }
        parts.append((name, type(module), shapes, sorted(plain.items())))
    return (repr(parts),)


class _Ahead(Sites):
    """Sites without batches: nothing is computed for experts, and pauses are looked at."""

    def __init__(self, model: Any, blocks: list[Block], alive: _Alive) -> None:
        super().__init__(model, blocks)
        self.alive, self.paused, self.experts = alive, 0, 1
        self.inputs: list[tuple[ref[Tensor], int, Site]] = []  # of the block under way

    def sites(self, block: Block) -> list[Site]:
        """Of a block that the scout is through with; a layer that it did not come by has none."""
        self.arrange(block)
        called = {site for site in self._of.values() if site.bank or site.layers[0].calls}
        return sorted(called, key=lambda site: site.place)

    def begin(self, block: Block) -> None:
        super().begin(block)
        self.inputs.clear()

    def _record(self, block: Block, layer: Layer, x: Tensor, batch: Batch) -> None:
        """As of a batch, which does not hold its inputs longer than the model itself does."""
        same = (
            site for seen, version, site in self.inputs if seen() is x and version == x._version
        )
        site = next(same, None)
        if site is None:
            self.paused = max(self.paused, self.alive.bytes())
            site = Site(block, [])
            self.inputs.append((ref(x), x._version, site))
            self._seen.append((x.new_empty(0), 0, site))
        site.layers.append(layer)
        self._of[layer] = site

    def _experts(self, bank: Bank, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert self.block is not None
        for site in self._bank_sites(self.block, bank):
            self._seen.append((x.new_empty(0), 0, site))
        self.experts = max(self.experts, index.shape[-1])
        # What the down projections read: a row for each expert of each token.
        inside = x.new_empty(index.numel(), bank.down[0][0].shape[1])
        self.paused = max(self.paused, self.alive.bytes())
        del inside
        return torch.empty_like(x)


class _Fused(TorchFunctionMode):
    """Attention as kernels compute it, without all scores at a time."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, _, value = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside it and are still there.

    Not of ``others``, whose views are made too.
    """

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__()
        self.most = 0
        self._others = {each.untyped_storage()._cdata for each in others}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def bytes(self) -> int:
        gone = [key for key, (storage, _) in self._storages.items() if storage.expired()]
        for key in gone:
            del self._storages[key]
        return sum(size for _, size in self._storages.values())

    def aside(self, tensor: Tensor) -> Tensor:
        """One like it that does not count."""
        other = torch.empty_like(tensor)
        key = other.untyped_storage()._cdata
        self._others.add(key)
        self._storages.pop(key, None)
        return other

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # What masks ask for: whether all is in order, as it is in whole sequences.
            return True if args[0].dtype == torch.bool else 1
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._others and key not in self._storages:
                    self._storages[key] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.bytes())
        return made
