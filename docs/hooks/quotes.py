"""Code that a page quotes from the package, beside the formula that it computes.

A fenced block that is titled with a file of ``src/`` must be in that file, line by line, though it
may be indented there: a quote that the source has outgrown fails the build, and
``tests/docs/test_pages.py``. The title gets the number of the first line.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUOTE = re.compile(r'^```python title="(src/[\w/]+\.py)"\n(.*?)^```', re.MULTILINE | re.DOTALL)


def place(path: str, quoted: str) -> int:
    """The number of the line of ``path`` where ``quoted`` begins; ``ValueError`` if it is absent,
    or there twice.
    """
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    wanted = quoted.rstrip("\n").splitlines()
    found = []
    for start in range(len(lines) - len(wanted) + 1):
        part = "\n".join(lines[start : start + len(wanted)])
        if textwrap.dedent(part) == "\n".join(wanted):
            found.append(start + 1)
    if len(found) != 1:
        raise ValueError(f"{path} has these lines {len(found)} times:\n{quoted}")
    return found[0]


def on_page_markdown(markdown: str, **_: Any) -> str:
    def titled(match: re.Match[str]) -> str:
        path, quoted = match.groups()
        return f'```python title="{path}, line {place(path, quoted)}"\n{quoted}```'

    return QUOTE.sub(titled, markdown)
