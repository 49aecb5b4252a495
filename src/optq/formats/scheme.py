"""What every format offers, and what a checkpoint's config says of its layers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optq.core.grid import Storage
from optq.core.weight import LayerScheme, QuantizedWeight, group_index
from optq.errors import ModelError, SettingError
from optq.model.checkpoint import TOGETHER

Solved = Mapping[str, tuple[QuantizedWeight, LayerScheme]]  # layers of a block, by name on disk
Schemes = Mapping[str, LayerScheme]  # of quantized layers, by name on disk
BLOCK = re.compile(r"(.*?\.)\d+\.")  # the start of names inside a block, and of its list
EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+")  # a projection, and where all experts are
CPU = torch.device("cpu")
SCALES = (torch.float16, torch.bfloat16, torch.float32)  # dtypes that are read


@dataclass(frozen=True)
class Detected:
    """The format of a checkpoint, and what its config says of each layer.

    ``layer`` takes a layer's name on disk, and gives None for one that the config leaves dense.
    """

    form: Format
    layer: Callable[[str], LayerScheme | None]


class Format(ABC):
    """One way to keep a quantized layer ``X`` as tensors ``X.SUFFIX`` instead of ``X.weight``."""

    name: str
    suffixes: tuple[str, ...]  # those that every layer has; the first one marks a layer
    optional: tuple[str, ...] = ()  # those that some layers have beside them
    settings_file: str | None = None  # where readers look for the settings beside config.json

    @property
    def parts(self) -> tuple[str, ...]:
        """All suffixes that a layer may have."""
        return self.suffixes + self.optional

    def storage(self, dtype: torch.dtype) -> Storage:
        """What survives in a file for a model of ``dtype``.

        For bfloat16, scales that are exact in both dtypes: every format can hold those, and readers
        may turn float16 scales into the model's dtype.
        """
        both = (torch.bfloat16, torch.float16)
        return Storage(both if dtype == torch.bfloat16 else (torch.float16,))

    def check(
        self, name: str, rows: int, columns: int, layer: LayerScheme, conv1d: bool = False
    ) -> None:
        """Refuse a layer that this format, or its readers, cannot hold. Raises ``SettingError``."""
        if layer.abits is not None and "weight" not in self.suffixes:
            raise SettingError(
                f"{self.name} says nothing of activations, and {name} reads them in"
                f" {layer.abits} bits",
                "quantize with --format compressed-tensors",
            )
        if layer.groupsize != -1 and columns % layer.groupsize:
            raise SettingError(
                f"groupsize {layer.groupsize} does not divide the {columns} columns of {name}",
                "quantize the model with groups that divide them",
            )

    @abstractmethod
    def encode(self, layer: QuantizedWeight, dtype: torch.dtype, sym: bool) -> dict[str, Tensor]:
        """The tensors by suffix, in main memory; they decode to the layer's weights.

        ``dtype`` is the model's, ``sym`` what the config will say of the layer.
        """

    def layout(
        self, rows: int, columns: int, layer: LayerScheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """What :meth:`encode` gives for a layer of this shape, without values.

        Found by encoding one; a format that knows better says so at once.
        """
        group = group_index(columns, columns if layer.groupsize == -1 else layer.groupsize, CPU)
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        grids = torch.ones(rows, int(group[-1]) + 1)
        zeros = torch.full_like(grids, 2 ** (layer.wbits - 1), dtype=torch.uint8)
        encoded = self.encode(
            QuantizedWeight(layer.wbits, codes, grids, zeros, group), dtype, layer.sym
        )
        return {suffix: tensor.to("meta") for suffix, tensor in encoded.items()}

    @abstractmethod
    def decode(self, name: str, tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
        """The inverse. Raises ``ModelError`` for tensors that contradict each other or ``layer``.

        The scales are float32. ``name`` is for the message.
        """

    @abstractmethod
    def config(
        self, layers: Schemes, dense: list[str], percdamp: float, outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The ``quantization_config``, with names as on disk.

        ``dense`` are linear layers inside the blocks that are not quantized, ``outside`` all that
        lie outside.
        """

    @abstractmethod
    def detect(self, settings: dict[str, Any]) -> Detected | None:
        """What a ``quantization_config`` says; None where it is another format's.

        Raises ``ModelError`` where it is this one's and cannot be read.
        """


def heads_of(layers: Iterable[str]) -> list[str]:
    """The output head, if it is among these layers: no other stands beside the model itself."""
    return [name for name in layers if "." not in name or name.endswith(".lm_head")]


def dense_experts(layers: Iterable[str], dense: Iterable[str]) -> dict[str, str]:
    """For each projection of an expert that is ``dense``, where the experts of its block are.

    vLLM has them in one module, and looks for a name of that alone.
    """
    packed = {found[1] for name in layers if (found := EXPERT.fullmatch(name))}
    places = {name: found[1] for name in dense if (found := EXPERT.fullmatch(name))}
    return {name: place for name, place in places.items() if place not in packed}


def has_drafts(layers: Iterable[str], outside: Collection[str]) -> bool:
    """Whether layers for multi-token prediction are ``outside``: ``mtp``, or blocks of their own.

    DeepSeek-V3's stand beside the model's blocks, as ``model.layers.61`` after 61 of them.
    """
    blocks = {found[0]: found[1] for name in layers if (found := BLOCK.match(name))}
    beside = {found[0]: found[1] for name in outside if (found := BLOCK.match(name))}
    more = any(first in blocks.values() for block, first in beside.items() if block not in blocks)
    return more or any("mtp" in name for name in outside)


def require_fit(
    name: str,
    tensors: Mapping[str, Tensor],
    fitting: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]],
    what: str,
) -> None:
    """Raises ``ModelError`` for a tensor of layer ``name`` of another shape or none of the dtypes.

    Tensors that are not there are not missed; ``what`` is what shapes must fit.
    """
    for suffix, (shape, dtypes) in fitting.items():
        tensor = tensors.get(suffix)
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in dtypes):
            wanted = tensor.dtype if tensor.dtype in dtypes else dtypes[0]
            raise ModelError(
                f"{name}.{suffix} is {tensor.dtype} {list(tensor.shape)} where {wanted}"
                f" {list(shape)} fits {what}",
                TOGETHER,
            )


def require_groups(name: str, g_idx: Tensor, groups: int) -> None:
    """Raises ``ModelError`` where the tensor ``name`` puts a column into a group that is not."""
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ModelError(f"{name} names groups outside 0 .. {groups - 1}", "copy the model again")
