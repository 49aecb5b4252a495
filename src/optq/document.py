"""What the documents beside a checkpoint have in common: typed, versioned, and never half read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from optq.errors import ModelError

Document = TypeVar("Document", bound=BaseModel)
STRICT = ConfigDict(frozen=True, allow_inf_nan=False)  # a number that is none is a damage


def written(document: BaseModel) -> str:
    """What its file says."""
    return json.dumps(document.model_dump(), indent=2, allow_nan=False) + "\n"


def read(document: type[Document], path: Path, version: int, lost: str) -> Document:
    """The document in a file; ``lost`` says what goes with it.

    Raises :class:`ModelError` for a damaged one, or one newer than ``version``.
    """
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        if made.get("version", version) > version:
            raise ModelError(
                f"{path} is of version {made['version']}, newer than this OPTQ",
                f"update OPTQ, or delete the file: {lost}",
            )
        return document.model_validate(made)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged", f"delete it: {lost}") from error
