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


def in_tuples() -> list[tuple[str, int, str]]:
    """The same of loops over tuples of what may be wrong, remedies included."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Tuple):
                continue
            names = {each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)}
            if {"reason", "remedy"} <= names or any(isinstance(x, ast.Raise) for x in node.body):
                texts = [
                    each.value for each in ast.walk(node.iter) if isinstance(each, ast.Constant)
                ]
                found += [
                    (path.name, node.lineno, text)
                    for text in texts
                    if isinstance(text, str) and len(text) > 6
                ]
    return found


def test_the_page_has_the_words_of_every_cause():
    """Constant text that a raise shows stands in the built page, letter by letter."""
    page = re.sub(r"\\(.)", r"\1", messages.tables())
    texts, listed = raised(), in_tuples()
    assert len(texts) > 150 and len(listed) > 8
    texts += listed
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
    for each in advised:  # of several that differ by what a run puts in, one stands for all
        form = ".*".join(re.escape(part) for part in each.split(messages.ANY))
        assert any(re.fullmatch(form, cause) for cause in causes), each


def test_every_message_has_a_remedy_in_the_source():
    """A remedy that the source does not spell out is rare."""
    found = messages.errors()
    unknown = [each for each in found if set(each.remedies) == {messages.ANY}]
    assert len(unknown) < len(found) / 40
    for line in messages.tables().splitlines():
        assert not re.search(r"\|\s*\|", line), f"a cell is empty: {line}"


def test_what_is_no_error_is_no_message():
    """`cls(None, None)` in `Tune.of` is none of `OutputError.of`."""
    causes = [cause for each in messages.errors() for cause in each.causes]
    assert "None" not in causes
    assert sum("cannot be written: " in cause for cause in causes) >= 1


def test_reason_and_remedy_stay_together():
    found = {
        (cause.partition("blocks: ")[2], each.remedies)
        for each in messages.errors()
        for cause in each.causes
        if each.module == "formats/gguf_blocks.py"
    }
    again = "quantize again with"
    assert ("its … columns are no multiple of 32", (f"{again} --skip for this layer",)) in found
    assert ("it is asymmetric at 8 bits", (f"{again} --sym",)) in found
    assert len(found) == 6
    assert any("… also has …" in each.causes for each in messages.errors())
