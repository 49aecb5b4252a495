"""The pages of the site: what they quote, link and leave out."""

import ast
import re
import sys

import pytest
from docs.pages import PAGES, ROOT, blocks

import optq

sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import quotes

QUOTED = [
    (page.name, path, lines)
    for page in PAGES
    for path, lines in quotes.QUOTE.findall(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "path", "lines"), QUOTED, ids=lambda each: str(each)[:40])
def test_what_a_page_quotes_is_in_the_source(page, path, lines):
    assert quotes.place(path, lines) > 1


def test_a_quote_that_the_source_does_not_have_is_refused():
    assert len(QUOTED) > 20
    with pytest.raises(ValueError, match="has these lines 0 times"):
        quotes.place("src/optq/errors.py", "class OptqError(ValueError):\n")
    with pytest.raises(ValueError, match=r"has these lines [2-9] times"):
        quotes.place("src/optq/core/grid.py", "@abstractmethod\n")


def test_the_title_of_a_quote_gets_its_line():
    quoted = "class OptqError(Exception):\n"
    page = quotes.on_page_markdown(f'```python title="src/optq/errors.py"\n{quoted}```\n')
    line = int(re.search(r'title="src/optq/errors.py, line (\d+)"', page)[1])
    source = (ROOT / "src/optq/errors.py").read_text(encoding="utf-8").splitlines()
    assert source[line - 1] == quoted.strip()


def test_every_public_name_has_its_reference():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = {name.rpartition(".") for name in re.findall(r"^::: (optq[\w.]*)$", page, re.MULTILINE)}
    for name in set(optq.__all__) - {"OptqError"}:
        assert (getattr(optq, name).__module__, ".", name) in named
    assert ("optq", ".", "errors") in named  # OptqError and what derives from it


def test_python_on_the_pages_is_python():
    found = [block for page in PAGES for block in blocks(page) if block.language == "python"]
    whole = [block for block in found if "title=" not in block.head]
    assert len(whole) > 4
    for block in whole:
        tree = ast.parse("\n".join(block.lines))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "optq":
                assert {each.name for each in node.names} <= set(optq.__all__)


def test_nothing_is_loaded_from_elsewhere():
    """The site is read without a network: its settings name no font, script or style outside."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert "://" not in settings
