"""What the pages hold: fenced blocks, commands, and what is marked as needing more."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\w*)")
NEEDS = re.compile(r"<!-- needs: ([a-z, ]+) -->")


@dataclass(frozen=True)
class Block:
    """A block of code: its language (``indented`` without a fence) and its lines.

    ``head`` is the line that opens the fence.
    """

    page: Path
    line: int
    head: str
    language: str
    lines: list[str]
    needs: tuple[str, ...]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order; ``needs`` stand in a comment on the line before."""
    lines = page.read_text(encoding="utf-8").splitlines()
    needs: tuple[str, ...] = ()
    at = 0
    while at < len(lines):
        if marked := NEEDS.fullmatch(lines[at].strip()):
            needs = tuple(word.strip() for word in marked[1].split(","))
        elif fence := FENCE.match(lines[at].strip()):
            stop = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            yield Block(page, at + 1, lines[at], fence[1], lines[at + 1 : stop], needs)
            at, needs = stop, ()
        elif lines[at].startswith("    ") and not (at and lines[at - 1].strip()):
            stop = at
            while stop < len(lines) and (lines[stop].startswith("    ") or not lines[stop].strip()):
                stop += 1
            yield Block(page, at + 1, "", "indented", [x[4:] for x in lines[at:stop]], needs)
            at, needs = stop - 1, ()
        elif lines[at].strip():
            needs = ()
        at += 1
