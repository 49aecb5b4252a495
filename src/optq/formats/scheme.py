"""What every format offers, and what a checkpoint's config says of its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optq.core.grid import Storage
from optq.core.weight import LayerScheme, QuantizedWeight

Solved = Mapping[str, tuple[QuantizedWeight, LayerScheme]]  # layers of a block, by name on disk


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

    @abstractmethod
    def storage(self, dtype: torch.dtype) -> Storage:
        """What survives in a file for a model of ``dtype``."""

    @abstractmethod
    def check(
        self, name: str, rows: int, columns: int, layer: LayerScheme, conv1d: bool = False
    ) -> None:
        """Refuse a layer that this format, or its readers, cannot hold. Raises ``SettingError``."""

    @abstractmethod
    def encode(self, layer: QuantizedWeight, dtype: torch.dtype, sym: bool) -> dict[str, Tensor]:
        """The tensors by suffix, in main memory; they decode to the layer's weights.

        ``dtype`` is the model's, ``sym`` what the config will say of the layer.
        """

    @abstractmethod
    def decode(self, name: str, tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
        """The inverse. Raises ``ModelError`` for tensors that contradict each other or ``layer``.

        The scales are float32. ``name`` is for the message.
        """

    @abstractmethod
    def config(
        self,
        layers: dict[str, LayerScheme],
        dense: list[str],
        percdamp: float,
        outside: Sequence[str] = (),
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
