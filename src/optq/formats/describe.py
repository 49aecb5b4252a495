"""What is in a checkpoint, without loading its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from optq.findings import FILE as FINDINGS
from optq.findings import Findings
from optq.formats import detect
from optq.formats.reader import packed_tensors, quantized_layers
from optq.formats.readers import who_loads
from optq.model.checkpoint import Checkpoint
from optq.model.dequantize import Dequantized
from optq.record import FILE, RunRecord


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Who loads it, format, settings, sizes in bytes; of OPTQ's own the records of the layers.

    ``evaluated`` is what `optq eval` has found of it, without the windows' losses.
    """
    config = checkpoint.config()
    found, form, on_disk = detect(checkpoint), "not quantized", checkpoint
    if isinstance(checkpoint, Dequantized):
        on_disk = checkpoint.source
        form = f"{on_disk.config()['quantization_config']['quant_method']}, read as "
        form += str(checkpoint.into).removeprefix("torch.")
    sizes = {name: tensor.nbytes for name, tensor in on_disk.layout.items()}
    what: dict[str, Any] = {
        "loads": [asdict(reader) for reader in who_loads(checkpoint)],
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "files": len(set(checkpoint.files.values())),
        "tensors": len(sizes),
        "bytes": sum(sizes.values()),
        "format": form,
        "layers": [],
    }
    if found is None:
        return what | _recorded(checkpoint)  # of one that was pruned
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
            **({} if common.abits is None else {"activation_bits": common.abits}),
        }
    what |= {
        "other_schemes": len(schemes) - 1,
        "quantized_layers": len(packed),
        "quantized_bytes": sum(sizes[name] for name in packed_tensors(checkpoint)),
    }
    return what | _recorded(checkpoint)


def _recorded(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the run that wrote it, and later evaluations, have left beside it."""
    what: dict[str, Any] = {}
    record = checkpoint.folder / FILE
    if record.is_file():
        made = RunRecord.read(record)
        what = made.model_dump(include={"method", "quantizer", "qep", "calibration", "layers"})
        what["bits_per_weight"] = round(made.bits_per_weight, 3)
        if made.tune:
            names = ", ".join(name for name, how in made.tune.items() if how)
            what["tuned"] = f"{names}; errors of layers are from before"
        if made.zeros is not None:
            what["zeros"] = f"{made.zeros:.2%} of the layers"
    findings = checkpoint.folder / FINDINGS
    if findings.is_file():
        known = Findings.read(findings)
        hidden = {"texts": {"__all__": {"losses"}}}
        what["evaluated"] = known.model_dump(include={"texts", "tasks"}, exclude=hidden)
    return what


def weights(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many weights a checkpoint has quantized, and how many bytes all its tensors would take
    if they were not, in the dtype that its config names. Of codes that fill their words; a layer
    with a remainder, of compressed-tensors, counts as if it had none.
    """
    found, packed = detect(checkpoint), packed_tensors(checkpoint)
    assert found is not None
    count = 0
    for name in quantized_layers(checkpoint):
        scheme = found.layer(name)
        codes = next(f"{name}.{part}" for part in found.form.parts if f"{name}.{part}" in packed)
        words = checkpoint.layout[codes]
        count += words.nbytes * 8 // scheme.wbits if scheme else 0
    config = checkpoint.config()
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    size = 4 if dtype.endswith("float32") else 2
    rest = checkpoint.layout.keys() - {*packed}
    return count, count * size + sum(checkpoint.layout[name].nbytes for name in rest)
