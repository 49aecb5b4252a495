"""On-disk formats: read, write, detect. One file and one row of ``FORMATS`` each."""

from __future__ import annotations

from typing import Any

from optq.errors import ModelError
from optq.formats.compressed_tensors import COMPRESSED_TENSORS
from optq.formats.gptq import GPTQ_V1, GPTQ_V2
from optq.formats.scheme import Format, Scheme

FORMATS: dict[str, Format] = {row.name: row for row in (GPTQ_V1, GPTQ_V2, COMPRESSED_TENSORS)}


def detect(config: dict[str, Any]) -> Scheme | None:
    """The scheme that a ``config.json`` declares, or None for a plain model.

    Raises :class:`ModelError` for a method that no format of ours holds.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ModelError("the quantization_config is no configuration", "copy config.json again")
    for form in FORMATS.values():
        scheme = form.detect(settings)
        if scheme is not None:
            return scheme
    raise ModelError(
        f"the model is quantized with {settings.get('quant_method')}",
        f"give a plain model, or one in {', '.join(FORMATS)}",
    )
