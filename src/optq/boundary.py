"""What other libraries raise, turned into errors of ours.

They raise more than they document: chat templates ``KeyError``, the Rust tokenizers a bare
``Exception``, a configuration whatever its own code does. So any exception of a library's call is
turned, its cause kept. Only the call stands inside ``with library``: defects of ours stay in sight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from optq.errors import OptqError


@contextmanager
def library(
    kind: type[OptqError],
    cause: str,
    remedy: str | Callable[[Exception], str],
    ours: Sequence[Exception] = (),
) -> Iterator[None]:
    """Run a library's call; what it raises becomes a ``kind``, its first line after ``cause``.

    Errors of OPTQ, want of memory and interrupts pass, and so does what code of ours that the
    library calls back has put into ``ours``.
    """
    try:
        yield
    except (OptqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if any(error is own for own in ours):
            raise
        what = remedy if isinstance(remedy, str) else remedy(error)
        raise kind(f"{cause}: {first_line(error)}", what) from error


def first_line(error: BaseException) -> str:
    """The first sentence of an error's text, in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        lines = [" ".join(lines[:2])]
    if not lines or " " not in lines[0]:  # a KeyError's text is the key alone
        lines = [": ".join([type(error).__name__, *lines[:1]])]
    return short(lines[0], 200)


def short(text: str, length: int = 60) -> str:
    """``text``, cut where it is longer: a message holds nobody's data."""
    return text if len(text) <= length else f"{text[: length - 2].rstrip()}.."
