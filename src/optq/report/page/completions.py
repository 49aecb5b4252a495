"""Greedy completions beside each other, with the first token that differs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from optq.findings import Completed, Findings

# What would reorder the text around it, or is not seen at all; line ends and tabs are text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SEEN = str.maketrans({"\n": "↵\n", "\t": "⇥\t"})
LINE_END = "↵"


def of(findings: Findings | None) -> list[dict[str, Any]]:
    """Each side as what both say, the first token that differs, and the rest."""
    return [_one(each) for each in ([] if findings is None else findings.completions)]


def _one(made: Completed) -> dict[str, Any]:
    at = len(made.tokens) if made.differs is None else made.differs
    sides = [("this checkpoint", made.tokens)]
    sides += [] if made.dense is None else [("full precision", made.dense)]
    return {
        "prompt": shown(made.prompt),
        "fault": made.fault,
        "differs": made.differs,
        "compared": made.dense is not None,
        "sides": [{"title": title, **_parted(tokens, at)} for title, tokens in sides],
    }


def _parted(tokens: Sequence[str], at: int) -> dict[str, Any]:
    """``first`` is the token at ``at``, with those behind it up to the first that has text: of a
    character of several tokens all but the last have none. ``ends``: there is no such token.
    """
    end = next((i for i in range(at, len(tokens)) if tokens[i]), len(tokens) - 1) + 1
    first = shown("".join(tokens[at:end]))
    words = first.rstrip("\n")
    lines = len(first) - len(words)  # the mark goes to the end of its line, not into the next
    return {
        "same": shown("".join(tokens[:at])),
        "first": words.translate(SEEN) + LINE_END * lines,
        "rest": "\n" * lines + shown("".join(tokens[end:])),
        "ends": not first,
    }


def shown(text: str) -> str:
    """Text whose controls are written out, as Python writes them."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
