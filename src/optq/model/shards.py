"""The weights of a model's blocks, left on disk until a block is fetched.

While transformers loads such a model, an :class:`Absent` stands for each of their tensors. Names,
shapes and conversions are all checked so, and the parameters end up on the meta device. A block's
tensors then go through the same code of transformers, alone: what it merges, concatenates or casts
is in memory for one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from optq.boundary import library
from optq.errors import ModelError
from optq.model.blocks import Block
from optq.model.checkpoint import Checkpoint
from optq.model.names import renaming
from optq.model.source import load_model, quiet, unloadable

PORTION = 2**28  # bytes of what is read or dequantized before transformers has merged it
Place = tuple[nn.Module, str]  # where a parameter stands: modules outlive their parameters


class Absent:
    """What transformers gets for a tensor on disk whose values it does not need yet."""

    def __init__(self, layout: Tensor) -> None:
        self.layout = layout  # on the meta device

    def __getitem__(self, _: Any) -> Absent:
        return self

    def to(self, device: Any = None, dtype: Any = None) -> Tensor:
        """Like it in ``dtype``, and without values on whatever device."""
        return self.layout.to(dtype=dtype)


class Shards:
    """Which tensors of ``checkpoint`` belong to ``blocks`` of ``model``, and how they get there.

    Those of files that cannot be mapped are left to transformers, and so are buffers and what the
    model ties: it compares values, and they are few.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, blocks: list[Block]) -> None:
        self.checkpoint, self.model = checkpoint, model
        self.names: dict[Place, list[str]] = {}
        self.outside: dict[Place, str] = {}  # what stands on disk as it is in the model
        self.strangers: list[str] = []  # what the model has no place for: layers for drafts, say
        if not checkpoint.mapped:
            return
        every = {place for block in blocks for place in places(block.module)}
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        rename, _ = renaming(model)
        state = model.state_dict()
        for on_disk in checkpoint.files:
            in_model, converted = rename(on_disk)
            if in_model not in state and on_disk not in state:
                self.strangers.append(on_disk)
            if in_model not in state:
                continue
            module, _, attribute = in_model.rpartition(".")
            place = (model.get_submodule(module), attribute)
            if place in every:
                if in_model not in tied:
                    self.names.setdefault(place, []).append(on_disk)
            elif converted is None and state[in_model].shape == checkpoint.layout[on_disk].shape:
                self.outside[place] = on_disk

    def read(self, block: Block) -> set[nn.Parameter]:
        """Give each parameter of the block that has no values its own; those that got them.

        They are memory of their own, on the CPU, and no file stays mapped for them. Raises
        :class:`ModelError` for a file that was damaged or changed since it was opened.
        """
        lacking = [place for place in places(block.module) if getattr(*place).is_meta]
        mapped = set()
        for wanted in self._portions(lacking):
            tensors = dict(self.checkpoint.tensors(wanted))
            self._load(tensors)
            for name, tensor in tensors.items():
                if not self.checkpoint.own(name):
                    mapped.add(tensor.untyped_storage().data_ptr())
            del tensors  # before others come
        read = set()
        for place in lacking:
            parameter = getattr(*place)
            if parameter.is_meta:
                raise self._changed(f"{block.name} lacks its {place[1]}")
            if parameter.data.untyped_storage().data_ptr() in mapped:
                parameter.data = parameter.data.clone()
            read.add(parameter)
        return read

    def _portions(self, lacking: list[Place]) -> Iterator[list[str]]:
        """The names on disk of what some parameters are made of, never of a part of one."""
        some: list[str] = []
        for names in filter(None, (self.names.get(place) for place in lacking)):
            size = sum(self.checkpoint.layout[name].nbytes for name in (*some, *names))
            if some and size > PORTION:
                yield some
                some = []
            some = [*some, *names]
        if some:
            yield some

    def read_outside(self, name: str) -> Tensor:
        """A parameter outside the blocks by its name on disk, as it stands there."""
        (tensor,) = (tensor for _, tensor in self.checkpoint.tensors([name]))
        if tensor.shape != self.checkpoint.layout[name].shape:
            raise self._changed(f"{name} has another shape")
        return tensor

    def _changed(self, what: str) -> ModelError:
        return ModelError(
            f"{self.checkpoint.folder} is not what it was when the run began: {what}",
            "copy the model again, and leave it alone while it is quantized",
        )

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Put these tensors into the model, as ``from_pretrained`` does with all of them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        model, used = self.model, getattr(self.model, "_weight_conversions", None)
        how = LoadStateDictConfig(
            dtype=model.dtype, weight_mapping=get_model_conversion_mapping(model)
        )
        with quiet(), library(*unloadable(self.checkpoint)):
            model._load_pretrained_model(model, tensors, None, how)
        model._weight_conversions = used  # save_pretrained reverts those of the whole model


def places(module: nn.Module) -> Iterator[Place]:
    """Where the parameters of a module, and of those inside it, stand."""
    for each in module.modules():
        for name, _ in each.named_parameters(recurse=False):
            yield each, name


def open_model(
    checkpoint: Checkpoint, find: Callable[[Any], list[Block]]
) -> tuple[Any, list[Block], Shards]:
    """What :func:`optq.model.source.load_model` gives, with its blocks' weights left on disk.

    ``find`` finds the blocks in the model's skeleton. Raises what the two raise.
    """
    found: list[tuple[list[Block], Shards]] = []

    def prepare(skeleton: Any, tensors: dict[str, Any]) -> tuple[()]:
        blocks = find(skeleton)
        shards = Shards(checkpoint, skeleton, blocks)
        for names in (shards.strangers, *shards.names.values()):
            tensors.update({name: Absent(checkpoint.layout[name]) for name in names})
        for name in shards.outside.values():  # each mapped for itself, so that each can go
            tensors.update(checkpoint.tensors([name]))
        found.append((blocks, shards))
        return ()

    model = load_model(checkpoint, prepare)
    return model, *found[0]
