"""Every message that a user's input can bring about, read from the package's source.

``errors()`` walks the syntax of ``src/optq`` for what is raised of ``optq.errors``: directly, by
``OutputError.of``, by ``with library(..)``, or from a function that returns cause and remedy, or
is given them. What a run puts in is shown as ``…``. The page that holds ``<!-- messages -->`` gets
them as tables, a class each; ``tests/docs/test_messages.py`` holds them against every ``raise``.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from expressions import ANY, SOURCE, calls, each_pair, texts_of, tree_of

MARK = "<!-- messages -->"
UNKNOWN = "(the message says it)"
REASON = "(a reason that optq inspect gives)"


@dataclass(frozen=True)
class Message:
    """What is raised in ``module``: its class, the cause's forms and the remedy's."""

    kind: str
    causes: tuple[str, ...]
    remedies: tuple[str, ...]
    module: str
    line: int


def classes() -> list[str]:
    """``OptqError`` and what derives from it, in the order of the file."""
    tree = tree_of(SOURCE / "errors.py")
    found = ["OptqError"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(
            getattr(b, "id", "") in found for b in node.bases
        ):
            found.append(node.name)
    return found


def errors() -> list[Message]:
    """All of them, in the order of files and lines."""
    kinds = classes()
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = tree_of(path)
        module = path.relative_to(SOURCE).as_posix()
        for call, scopes in calls(tree, [tree]):
            for kind, cause, remedy, line in _parts(call, kinds, scopes):
                for *pair, inside in each_pair(cause, remedy, scopes):
                    causes, remedies = (texts_of(node, inside) for node in pair)
                    if getattr(call.func, "id", "") == "library":  # adds what the library said
                        causes = tuple(f"{text}: {ANY}" for text in causes)
                    found.append(Message(kind, causes, remedies, module, line))
    return found


Parts = tuple[str, ast.expr, ast.expr | None, int]


def _parts(call: ast.Call, kinds: list[str], scopes: list[Any]) -> list[Parts]:
    """Class, cause, remedy and line of each error that the call makes."""
    name, arguments = getattr(call.func, "id", ""), call.args
    if name in kinds and len(arguments) == 2:
        return [(name, *arguments, call.lineno)]
    if name in kinds and len(arguments) == 1 and isinstance(arguments[0], ast.Starred):
        return [(name, *pair.elts, pair.lineno) for pair in _pairs(scopes[-1])]
    if name == "library" and len(arguments) > 1:
        kind = getattr(arguments[0], "id", "")
        remedy = arguments[2] if len(arguments) > 2 else None
        return [(kind if kind in kinds else "ModelError", arguments[1], remedy, call.lineno)]
    if name == "kind" and len(arguments) == 2:  # the class of weights that do not fit
        return [("ModelError", *arguments, call.lineno)]
    if name == "cls" and len(arguments) == 2 and _of_output_error(scopes):
        return [("OutputError", *arguments, call.lineno)]
    return []


def _of_output_error(scopes: list[Any]) -> bool:
    """Whether the innermost function is a method of ``OutputError``."""
    return any(
        isinstance(node, ast.ClassDef) and node.name == "OutputError" and scopes[0] in node.body
        for node in scopes[-1].body
    )


def _pairs(tree: ast.Module) -> Iterator[ast.Tuple]:
    """What the functions of a module return that promise a cause and a remedy."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "tuple[str, str]" in ast.unparse(
            node.returns or node
        ):
            for each in ast.walk(node):
                if isinstance(each, ast.Return) and isinstance(each.value, ast.Tuple):
                    yield each.value


def tables() -> str:
    """A heading and a table for each class."""
    about = {}
    tree = tree_of(SOURCE / "errors.py")
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            about[node.name] = (ast.get_docstring(node) or "").splitlines()[0]
    lines: list[str] = []
    found = errors()
    for kind in classes():
        rows = sorted(
            {
                (cause, _some(each.remedies), each.module)
                for each in found
                if each.kind == kind
                for cause in each.causes
                if cause.strip(f"{ANY} ")
            }
        )
        if not rows:
            continue
        lines += [
            f"### {kind}",
            "",
            about[kind],
            "",
            "| message | what to do | raised in |",
            "|---|---|---|",
        ]
        lines += [
            f"| {_cell(cause)} | {_cell(remedy)} | `{module}` |" for cause, remedy, module in rows
        ]
        lines.append("")
    return "\n".join(lines)


def _some(texts: tuple[str, ...]) -> str:
    known = [text for text in texts if text.strip(f"{ANY} ")]
    return "; or ".join(known) or (REASON if texts == ("",) else UNKNOWN)


def _cell(text: str) -> str:
    """Of a Markdown table, shown letter by letter."""
    plain = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", escape(plain, quote=False))


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, tables()) if MARK in markdown else markdown
