"""``optq quantize --method llm-int8``: what bitsandbytes makes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optq.cli import imports
from optq.cli.app import print_json, refuse_given, say


def run(
    model: str,
    out: Path,
    device: str,
    dtype: str | None,
    skip: str | None,
    force: bool,
    as_json: bool,
    others: dict[str, Any],
) -> None:
    """Write OUT. ``others`` are options that the method has no use for; None: not given."""
    remedy = "leave it out: nothing is calibrated, and weights have 8 bits"
    refuse_given(others, "llm-int8", remedy)
    imports.load()
    from optq.config import ModelConfig
    from optq.formats.bitsandbytes import require_bitsandbytes, write_llm_int8
    from optq.report import steps, tables

    require_bitsandbytes()
    config = ModelConfig(model, device, dtype)
    checkpoint = config.plain_checkpoint()
    layers = write_llm_int8(checkpoint, out, config.torch_device(), skip, force, say)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if as_json:
        facts = {"model": model, "out": str(out), "method": "llm-int8", "wbits": 8, "abits": 8}
        print_json(facts | {"quantized_layers": layers, "bytes": size})
        return
    tables.facts(
        {
            "wrote": f"{out}  (bitsandbytes, {tables.size(size)})",
            "layers": f"{layers} in 8 bits",
            "loads": "transformers with bitsandbytes; OPTQ does not read it",
        }
    )
    steps.show(steps.command("compare", model, "--methods", "w8a8,smoothquant,llm-int8"))
