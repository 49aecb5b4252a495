"""What every format offers, and what a checkpoint's config says of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optq.core.grid import Storage
from optq.core.weight import LayerScheme, QuantizedWeight


@dataclass(frozen=True)
class Scheme:
    """The format of a checkpoint, and what its config says of each layer.

    ``layer`` takes a layer's name on disk, and gives None for one that the config leaves dense.
    """

    form: Format
    layer: Callable[[str], LayerScheme | None]


class Format(Protocol):
    """One way to keep a quantized layer ``X`` as tensors ``X.SUFFIX`` instead of ``X.weight``."""

    @property
    def name(self) -> str: ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those that every layer has; the first one marks a layer."""
        ...

    @property
    def optional(self) -> tuple[str, ...]:
        """Those that some layers have beside them."""
        ...

    @property
    def settings_file(self) -> str | None:
        """Where readers look for the settings beside ``config.json``."""
        ...

    def storage(self, dtype: torch.dtype) -> Storage:
        """What survives in a file for a model of ``dtype``."""
        ...

    def check(
        self, name: str, rows: int, columns: int, layer: LayerScheme, conv1d: bool = False
    ) -> None:
        """Refuse a layer that this format, or its readers, cannot hold. Raises ``SettingError``."""
        ...

    def encode(self, layer: QuantizedWeight, dtype: torch.dtype, sym: bool) -> dict[str, Tensor]:
        """The tensors by suffix, in main memory; they decode to the layer's weights.

        ``dtype`` is the model's, ``sym`` what the config will say of the layer.
        """
        ...

    def decode(self, name: str, tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
        """The inverse. Raises ``ModelError`` for tensors that contradict each other or ``layer``.

        The scales are float32. ``name`` is for the message.
        """
        ...

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
        ...

    def detect(self, settings: dict[str, Any]) -> Scheme | None:
        """The scheme of a ``quantization_config``; None where it is another format's.

        Raises ``ModelError`` where it is this one's and cannot be read.
        """
        ...
