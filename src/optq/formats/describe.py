"""What is in a checkpoint, without loading its weights."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from optq.errors import ModelError
from optq.formats import detect
from optq.formats.reader import quantized_layers
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
    packed = quantized_layers(checkpoint)
    schemes = Counter(found.layer(name) for name in packed)
    common = schemes.most_common(1)[0][0] if packed else None
    if common is not None:
        what |= {
            "format": found.form.name,
            "bits": common.wbits,
            "group_size": common.groupsize,
            "sym": common.sym,
            "desc_act": common.actorder,
        }
    suffixes = found.form.suffixes + found.form.optional
    parts = [f"{name}.{suffix}" for name in packed for suffix in suffixes]
    what |= {
        "other_schemes": len(schemes) - 1,
        "quantized_layers": len(packed),
        "quantized_bytes": sum(sizes.get(part, 0) for part in parts),
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
