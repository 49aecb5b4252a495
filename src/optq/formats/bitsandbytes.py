"""LLM.int8() by the package bitsandbytes, which transformers drives: on a CPU, too.

Nothing is calibrated: rows of weights are rounded to 8 bits, and what of the activations is an
outlier is found when they are read. transformers with bitsandbytes loads what is written; it is for
no other program. What the method leaves of a model is measured without the package:
:mod:`optq.evaluate.llm_int8`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from optq.boundary import library
from optq.errors import ModelError, SettingError
from optq.formats.place import place_of
from optq.formats.whole import writing
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.source import empty_model

THRESHOLD = 6.0  # the paper's


def require_bitsandbytes() -> None:
    """Raises ``SettingError`` where the package is not installed."""
    if find_spec("bitsandbytes") is None:
        raise SettingError(
            "LLM.int8() runs through the package bitsandbytes, which is not installed",
            "run `pip install bitsandbytes accelerate`",
        )


def write_llm_int8(
    checkpoint: Checkpoint,
    target: Path,
    device: torch.device,
    skip: str | None = None,
    force: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> int:
    """Write ``target``, whole or not at all; how many layers are in 8 bits.

    ``skip`` is a regular expression of layers to leave dense. Raises ``SettingError`` without the
    package, :class:`ModelError` for what it, or transformers, cannot load.
    """
    require_bitsandbytes()
    import transformers

    skeleton: Any = empty_model(checkpoint)
    blocks = find_blocks(skeleton, skip)
    if bank := next((bank for block in blocks for bank in block.banks), None):
        raise SettingError(
            f"{bank.name} are experts, which LLM.int8() does not reach",
            "choose --method gptq --wbits 8",
        )
    inside = {layer.name for block in blocks for layer in block.layers}
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    dense = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, linear) and name not in inside
    ]
    how = transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=THRESHOLD, llm_int8_skip_modules=dense
    )
    with place_of(target, checkpoint, force, notice) as place:
        cause = f"bitsandbytes cannot quantize {checkpoint.folder}"
        remedy = "update bitsandbytes, accelerate and transformers, or choose another method"
        with library(ModelError, cause, remedy):
            model = type(skeleton).from_pretrained(
                checkpoint.folder,
                quantization_config=how,
                device_map={"": str(device)},
                dtype=skeleton.config.dtype,
            )
        with writing(target):
            place.part.mkdir(exist_ok=True)
        with library(ModelError, cause, remedy):
            model.save_pretrained(place.part)
        with writing(target):
            for path in checkpoint.companions():
                if path.is_dir():
                    shutil.copytree(path, place.part / path.name, dirs_exist_ok=True)
                elif not (place.part / path.name).exists():
                    shutil.copy(path, place.part / path.name)
        place.appear()
    return len(inside)
