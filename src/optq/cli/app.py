"""The command's options and helpers, which its modules share."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="optq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or 'demo'.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ..")]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16 or float32, where the model's own float16 overflows.")
]
Seqlen = Annotated[
    int | None, typer.Option(help="Tokens in a sequence: 2048, or the model's positions if fewer.")
]
FORMATS_HELP = "gptq, gptq_v2, compressed-tensors"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, allow_nan=False))


def say(line: str) -> None:
    """What a person should know and no program reads."""
    print(f"optq: {line}", file=sys.stderr)
