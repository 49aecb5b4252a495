"""Arguments and options that several commands take."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or 'demo'.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ..")]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16 or float32, where the model's own float16 overflows.")
]
Seqlen = Annotated[
    int | None, typer.Option(help="Tokens in a sequence: 2048, or the model's positions if fewer.")
]
FORMATS_HELP = "gptq, gptq_v2, compressed-tensors"
Skip = Annotated[str | None, typer.Option(help="Regex of layers to leave dense.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
NSAMPLES = 128  # calibration sequences, where nothing is asked for
