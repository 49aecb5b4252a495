"""The page of messages has every error that the package raises."""

import ast
import re
import sys

from docs.pages import ROOT

sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import messages

SOURCE = ROOT / "src" / "optq"
PAGE = ROOT / "docs" / "messages.md"


def raised() -> list[tuple[str, int, str]]:
    """Module, line and text of every string that a ``raise`` of ours holds, found another way."""
    kinds = {*messages.classes(), "kind"}
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if not isinstance(call, ast.Call) or getattr(call.func, "id", "") not in kinds:
                continue
            if len(call.args) == 2:
                texts = [
                    each.value
                    for each in ast.walk(call.args[0])
                    if isinstance(each, ast.Constant) and isinstance(each.value, str)
                ]
                found += [(path.name, call.lineno, text) for text in texts if len(text) > 12]
    return found


def test_the_page_has_the_words_of_every_cause():
    """Constant text that a raise shows stands in the built page, letter by letter."""
    page = re.sub(r"\\(.)", r"\1", messages.tables())
    texts = raised()
    assert len(texts) > 150
    for module, line, text in texts:
        shown = messages.escape(re.sub(r"\s+", " ", text), quote=False)
        assert shown in page, (module, line, text)


def test_the_page_is_filled_where_it_says():
    page = messages.on_page_markdown(PAGE.read_text(encoding="utf-8"))
    assert messages.MARK not in page
    for kind in messages.classes()[1:]:
        assert f"### {kind}\n" in page or kind == "PeerError"
    assert page.count("\n| ") > 200
    assert messages.on_page_markdown("another page") == "another page"


def test_advice_is_about_messages_that_exist():
    causes = {cause for each in messages.errors() for cause in each.causes}
    advised = re.findall(r"^\*\*(.+)\*\*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(advised) > 15
    assert set(advised) <= causes


def test_every_message_has_a_remedy_in_the_source():
    """A remedy that the source does not spell out is rare."""
    found = messages.errors()
    unknown = [each for each in found if set(each.remedies) == {messages.ANY}]
    assert len(unknown) < len(found) / 10
