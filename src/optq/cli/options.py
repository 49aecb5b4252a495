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
Calib = Annotated[
    str | None,
    typer.Option(
        help="demo, a .txt, .jsonl or .json file, wikitext2, ptb, c4, NAME:SPLIT:COLUMN."
        " Default: c4; demo for the bundled model."
    ),
]
NSamples = Annotated[int, typer.Option(help="Calibration sequences.")]
Seed = Annotated[int, typer.Option(help="Of the calibration sequences.")]
Chat = Annotated[bool, typer.Option("--chat", help="Use the chat template.")]
ActivationMemory = Annotated[
    str | None,
    typer.Option(
        help="What batches may hold on the device, 8GB say; the rest goes to host memory, then"
        " to files. Default: half of what is free."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Do not go on from a run that was cut off.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what a run would do and need, and do nothing.")
]
