"""The command, and helpers that its modules share."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import typer

from optq.cli.imports import ELASTIC
from optq.errors import SettingError

app = typer.Typer(
    name="optq", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, allow_nan=False))


def say(line: str) -> None:
    """What a person should know and no program reads."""
    print(f"optq: {line}", file=sys.stderr)


def reports() -> bool:
    """Whether this process is the one that a person hears from: of those of torchrun, the first."""
    return ELASTIC not in os.environ or os.environ["RANK"] == "0"


def words(flag: str, text: str, kind: Callable[[str], Any] = str.strip) -> list[Any]:
    """What stands between the commas, each once; ``kind`` is ``int`` for numbers."""
    try:
        found = list(dict.fromkeys(kind(word) for word in text.split(",") if word.strip()))
    except ValueError:
        raise SettingError(f"{flag} {text} is no number", "put commas between numbers") from None
    if not found:
        raise SettingError(f"{flag} is empty", "give one or more, with commas between")
    return found


def size(flag: str, text: str | None) -> int | None:
    """Bytes: ``8GB``, ``500 MB``, ``16GiB``, or a plain number."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE)
    try:
        number, unit, binary = found.groups() if found else ("", "", "")
        base = 1024 if binary else 1000
        return int(float(number) * base ** " kmgt".index(unit.lower() or " "))
    except ValueError:
        cause = f"{flag} {text} is no size"
        raise SettingError(cause, "write it like 8GB, 500MB or 16GiB") from None


def refuse_given(options: dict[str, Any], what: str, remedy: str) -> None:
    """Refuse an option that ``what`` would ignore. One that was not given is None."""
    for name, value in options.items():
        if value is not None:
            flag = ("no-" if value is False else "") + name.replace("_", "-")
            raise SettingError(f"{what} has no --{flag}", remedy)
