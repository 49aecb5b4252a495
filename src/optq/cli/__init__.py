"""The command: flags become objects. Nothing here imports torch before a command runs."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from optq import __version__

# Their commands register themselves.
from optq.cli import compare, evaluate, prune, quantize, report, use  # noqa: F401
from optq.cli.app import app
from optq.errors import OptqError, PeerError


def main() -> NoReturn:
    """Run the command: exit status 0 done, 2 bad input, 1 a defect, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # a model may write what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `kill` cleans up as well
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # newer versions of typer turn Ctrl-C into this code themselves
            _interrupted()
    except PeerError as error:
        print(f"optq: {error.cause}: {error.remedy}", file=sys.stderr)
        code = 1
    except OptqError as error:
        _say(error.cause, error.remedy)
        code = 2
    except BrokenPipeError:  # of `optq .. | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
        code = 130
    except Exception as error:
        # typer brings its own copy of click or shares one, depending on its version: its usage
        # errors are known by what they can do.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        code = error.exit_code
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize the weights of language models to 2, 3, 4 or 8 bits with GPTQ, and run them."""


def _interrupted() -> None:
    _say("interrupted", "what was there before is as it was: run the command again")


def _say(cause: str, remedy: str) -> None:
    print(f"optq: {cause}", file=sys.stderr)
    print(f"      {remedy}", file=sys.stderr)
