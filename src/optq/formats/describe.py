"""What is in a checkpoint, without loading its weights."""

from __future__ import annotations

import json
from typing import Any

from optq.errors import ModelError
from optq.formats.gptq import SUFFIXES, detect
from optq.formats.writer import RECORD
from optq.model.checkpoint import Checkpoint, tensor_sizes


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Format, settings, sizes in bytes, and the records of the layers if OPTQ wrote them."""
    config = checkpoint.config()
    sizes = tensor_sizes(checkpoint)
    found = detect(config)
    what: dict[str, Any] = {
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "files": len(set(checkpoint.files.values())),
        "tensors": len(sizes),
        "bytes": sum(sizes.values()),
        "format": "not quantized",
        "layers": [],
    }
    if found is None:
        return what
    settings = config["quantization_config"]
    packed = [name.removesuffix(".qweight") for name in sizes if name.endswith(".qweight")]
    what |= {
        "format": found[0].name,
        **{key: settings.get(key) for key in ("bits", "group_size", "sym", "desc_act")},
        "quantized_layers": len(packed),
        "quantized_bytes": sum(sizes[f"{name}.{s}"] for name in packed for s in SUFFIXES),
    }
    record = checkpoint.folder / RECORD
    if record.is_file():
        try:
            made = json.loads(record.read_text())
            keys = ("method", "quantizer", "qep", "calibration", "layers")
            what |= {key: made[key] for key in keys}
            what["bits_per_weight"] = round(made["bits_per_weight"], 3)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{record} is damaged", "delete it: only its errors by layer are lost"
            ) from error
    return what
