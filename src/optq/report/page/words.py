"""How the page writes numbers, commands and names."""

from __future__ import annotations

import math
from typing import Any

TIMES = "\N{MULTIPLICATION SIGN}"
MUCH = 2  # a ratio above which it is said as one, not as a percentage
SHORT = 24  # characters of a word that a line of code is not broken in


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, its trailing zeros among them; no exponent unless
    it is tiny or huge.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if abs(value) >= 10**digits:
        return f"{value:.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    made = f"{value:#.{digits}g}".removesuffix(".")
    return f"{value:.{digits}g}" if "e" in made else made


def percent(share: float, digits: int = 3) -> str:
    """A share with so many significant digits."""
    return f"{100 * share:.0f}%" if share >= 1 else f"{significant(100 * share, digits)}%"


def number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}"


def change(ratio: float) -> str:
    """What a perplexity became of another: ``+2.39%``, or how many times where that is over 2."""
    return f"{TIMES}{significant(ratio)}" if ratio > MUCH else f"{100 * (ratio - 1):+.2f}%"


def change_error(error: float, ratio: float) -> str:
    """The standard error of such a change, in the same unit."""
    return significant(error, 2) if ratio > MUCH else f"{significant(100 * error, 2)}%"


def code(words: str) -> Any:
    """What stands between backticks as HTML's code."""
    from markupsafe import Markup, escape

    parts = words.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(unbroken(part)) if index % 2 else escape(part)
        for index, part in enumerate(parts)
    )


def unbroken(command: str) -> Any:
    """A command of which no short word is broken: a line could end inside ``--text`` else."""
    from markupsafe import Markup, escape

    kept = Markup('<span class="word">{}</span>')
    words = command.split(" ")
    return Markup(" ").join(
        kept.format(word) if len(word) <= SHORT else escape(word) for word in words
    )


def dotted(name: str) -> Any:
    """A layer's name, that a line may break after its dots."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(name.split("."))


FILTERS = {
    **{"significant": significant, "percent": percent, "number": number, "change": change},
    **{"change_error": change_error, "code": code, "unbroken": unbroken, "dotted": dotted},
}
