"""Which model, and where: what a name on the command line or in Python stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch

from optq.boundary import short
from optq.errors import SettingError
from optq.formats import reader, require_plain
from optq.model.checkpoint import Checkpoint
from optq.model.dequantize import dequantized
from optq.model.source import load_tokenizer
from optq.ranks import launched, local_rank

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and where it is quantized.

    ``model_id``: a folder, a hub id, or ``demo``. ``device``: ``auto`` (the first GPU, else the
    CPU) or what ``torch.device`` takes. ``dtype``: ``bfloat16`` or ``float32`` instead of the
    checkpoint's own, such as a float16 that the activations overflow; what is written names it.
    """

    model_id: str
    device: str = "auto"
    dtype: str | None = None

    @property
    def is_demo(self) -> bool:
        return self.model_id == "demo"

    def checkpoint(self, whole: bool = True) -> Checkpoint:
        """The checkpoint on disk; one of fp8 or MXFP4 weights as the plain one it stands for.

        Unless it has to be ``whole``, its headers will do.
        """
        from optq.demo import MODEL

        if self.dtype not in (None, *DTYPES):
            raise SettingError(f"the dtype is {self.dtype}", f"choose {' or '.join(DTYPES)}")
        folder = MODEL if self.is_demo else self.model_id
        return dequantized(Checkpoint.open(str(folder), DTYPES.get(self.dtype or ""), whole))

    def plain_checkpoint(self, whole: bool = True) -> Checkpoint:
        """The same. Raises :class:`ModelError` where it is quantized already."""
        checkpoint = self.checkpoint(whole)
        require_plain(checkpoint)
        return checkpoint

    def load(self) -> tuple[Any, Any]:
        """The model on its device, quantized or not, and its tokenizer."""
        device, checkpoint = self.torch_device(), self.checkpoint()
        return reader.load_checkpoint(checkpoint, device), load_tokenizer(checkpoint)

    def torch_device(self) -> torch.device:
        """The device, checked to be there."""
        if self.device == "auto":
            return _own("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = _own(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise SettingError(
                f"the device {self.device} is not here", "choose cpu, or auto"
            ) from error
        if device.type not in ("cpu", "cuda"):
            raise SettingError(f"the device {self.device} is not supported", "choose cpu or cuda")
        return device


def _own(name: str) -> torch.device:
    """The device; of several processes on a machine each has its own GPU."""
    return (
        torch.device("cuda", local_rank()) if name == "cuda" and launched() else torch.device(name)
    )


def check_types(made: Any, hints: Mapping[str, Any]) -> None:
    """Refuse what is not of the type that a field of ``made`` is annotated with."""
    examples = {"model_config": 'ModelConfig("folder")', "quantizer": "GPTQ(wbits=4), say"}
    for name, hint in hints.items():
        parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds, value = tuple(get_origin(part) or part for part in parts), getattr(made, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = examples.get(name, f"what is {type(made).__annotations__[name]}")
            raise SettingError(f"{name} is {short(repr(value))}", f"pass {wanted}")


def load(path: str | Path, device: str = "auto") -> Any:
    """The transformers model in the folder ``path``, or of a hub id, ready to run on ``device``.

    Quantized layers stay packed and multiply through :mod:`optq.kernels`; gptq, gptq_v2 and
    compressed-tensors' pack-quantized are read, whoever wrote them. Raises
    :class:`optq.errors.ModelError` for a checkpoint that is damaged or of another method.
    """
    config = ModelConfig(str(path), device)
    return reader.load_checkpoint(config.checkpoint(), config.torch_device())
