"""Calibration data that a caller of the API holds: texts, records, or what a tokenizer gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optq.boundary import library, short
from optq.data.text import Text, document_in
from optq.errors import DataError


def given(calib: Iterable[Any], chat: bool = False) -> Text | Tensor:
    """``calib`` as a text to cut windows from, or as token ids ``[samples, tokens]``.

    A list, a column or a dataset of texts, of records (``text``, or ``messages`` for ``chat``) or
    of conversations is one text. Ids are rows of one length: lists, tensors, or a tokenizer's
    dicts with ``input_ids``. Raises ``DataError`` for anything else, and for padded ids.
    """
    if isinstance(calib, Tensor):
        return calib
    if isinstance(calib, Mapping) and not (
        calib.keys() & {"input_ids", "messages"} or isinstance(calib.get("text"), str)
    ):  # a table, or the splits of a dataset
        keys = short(", ".join(map(str, calib)))
        remedy = "pass what one of its keys holds, such as calib=data['text']"
        raise DataError(f"the calibration is a dict of {keys}, not a text", remedy)
    rows = [calib] if isinstance(calib, Mapping) else list(calib)
    if not rows:
        raise DataError("the list of calibration texts is empty", "put texts into it")
    first = rows[0]
    if isinstance(first, str):  # numpy's have a tolist too
        tokenized = False
    elif isinstance(first, int | float) or getattr(first, "ndim", 1) == 0:
        remedy = "pass rows of ids, [samples, tokens], or one row as calib=[ids]"
        raise DataError("the calibration is a flat list of numbers", remedy)
    elif isinstance(first, Mapping):
        tokenized = "input_ids" in first
    else:
        numbers = isinstance(first, list | tuple) and first and isinstance(first[0], int | float)
        tokenized = bool(numbers) or hasattr(first, "tolist")  # of a tensor or an array
    if tokenized:
        return _ids(rows)
    name = f"list of {len(rows)} texts"
    documents = [
        row if isinstance(row, list) else document_in(row, f"{name}: record {number}", chat)
        for number, row in enumerate(rows, start=1)
    ]
    return Text(name, documents, "\n\n")


def described(calib: str | Text | Tensor, tokens: Tensor, seed: int, chat: bool) -> dict[str, Any]:
    """What a checkpoint says of its calibration: a file's name, not where it lay."""
    size = {"samples": tokens.shape[0], "seqlen": tokens.shape[1]}
    if isinstance(calib, Tensor):
        return {"text": "token ids", **size}
    name = calib.name if isinstance(calib, Text) else calib
    text = Path(name).name if Path(name).is_file() else name
    return {"text": text, **size, "seed": seed, "chat": chat}


def _ids(rows: list[Any]) -> Tensor:
    cause = "the calibration ids are not rows of one length"
    remedy = "pass ids of one length without padding, or texts, which OPTQ cuts into sequences"
    with library(DataError, cause, remedy):
        masks = [row.get("attention_mask", 1) for row in rows if isinstance(row, Mapping)]
        if not all(torch.as_tensor(mask).all() for mask in masks):
            raise DataError("the calibration ids are padded", remedy)
        ids = [row["input_ids"] if isinstance(row, Mapping) else row for row in rows]
        tensors = [torch.as_tensor(each) for each in ids]
        return torch.cat([each.reshape(-1, each.shape[-1]) for each in tensors])
