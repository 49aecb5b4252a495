"""Every message that a user's input can bring about, read from the package's source.

``errors()`` walks the syntax of ``src/optq`` for what is raised of ``optq.errors``: directly, by
``OutputError.of``, by ``with library(..)``, or from a function that returns cause and remedy. What
a run puts in is shown as ``…``. The page that holds ``<!-- messages -->`` gets them as tables, a
class each; ``tests/docs/test_messages.py`` holds them against every ``raise``.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src" / "optq"
MARK = "<!-- messages -->"
ANY = "…"


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
    tree = ast.parse((SOURCE / "errors.py").read_text(encoding="utf-8"))
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
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = path.relative_to(SOURCE).as_posix()
        for call, scopes in _calls(tree, [tree]):
            for kind, cause, remedy, line in _parts(call, kinds, scopes):
                causes, remedies = (_texts(node, scopes) for node in (cause, remedy))
                if getattr(call.func, "id", "") == "library":  # adds what the library said
                    causes = tuple(f"{text}: {ANY}" for text in causes)
                found.append(Message(kind, causes, remedies, module, line))
    return found


def _calls(node: ast.AST, scopes: list[Any]) -> Iterator[tuple[ast.Call, list[Any]]]:
    for child in ast.iter_child_nodes(node):
        inside = [child, *scopes] if isinstance(child, ast.FunctionDef) else scopes
        if isinstance(child, ast.Call):
            yield child, inside
        yield from _calls(child, inside)


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
    if name == "cls" and len(arguments) == 2 and getattr(scopes[0], "name", "") == "of":
        return [("OutputError", *arguments, call.lineno)]
    return []


def _pairs(tree: ast.Module) -> Iterator[ast.Tuple]:
    """What the functions of a module return that promise a cause and a remedy."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "tuple[str, str]" in ast.unparse(
            node.returns or node
        ):
            for each in ast.walk(node):
                if isinstance(each, ast.Return) and isinstance(each.value, ast.Tuple):
                    yield each.value


def _texts(node: ast.expr | None, scopes: list[Any], depth: int = 0) -> tuple[str, ...]:
    """The texts that an expression can be, as far as the source says."""
    unknown = (ANY,)
    if depth > 6 or node is None:
        return unknown
    if isinstance(node, ast.Constant):
        return (str(node.value),)
    if isinstance(node, ast.JoinedStr):
        parts = [
            (str(v.value),) if isinstance(v, ast.Constant) else _inserted(v, scopes, depth)
            for v in node.values
        ]
        return tuple("".join(each) for each in product(*parts))
    if isinstance(node, ast.IfExp):
        both = (_texts(each, scopes, depth + 1) for each in (node.body, node.orelse))
        return tuple(dict.fromkeys(text for texts in both for text in texts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pair = (_texts(each, scopes, depth + 1) for each in (node.left, node.right))
        return tuple("".join(each) for each in product(*pair))
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("replace", "removeprefix"):
        return _texts(node.func.value, scopes, depth + 1)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _returned(node.func.id, scopes[-1], depth) or unknown
    if isinstance(node, ast.Name):
        return _assigned(node.id, scopes, depth) or unknown
    return unknown


def _inserted(node: ast.expr, scopes: list[Any], depth: int) -> tuple[str, ...]:
    """What stands in the braces of an f-string: a text only if it is a choice of texts."""
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.Name | ast.IfExp):
        texts = _texts(value, scopes, depth + 1)
        if len(texts) < 4:
            return texts
    return (ANY,)


def _home(name: str, tree: ast.Module) -> ast.Module | None:
    """The module of the package that ``name`` is imported from."""
    for node in tree.body:
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and name in [each.name for each in node.names]:
            path = SOURCE.parent / Path(*module.split("."))
            files = path.with_suffix(".py"), path / "__init__.py"
            file = next((each for each in files if each.is_file()), None)
            return ast.parse(file.read_text(encoding="utf-8")) if file else None
    return None


def _returned(name: str, tree: ast.Module, depth: int) -> tuple[str, ...]:
    """The texts that a function of this module, or an imported one, returns."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            values = [each.value for each in ast.walk(node) if isinstance(each, ast.Return)]
            found = [text for value in values for text in _texts(value, [node, tree], depth + 1)]
            return tuple(dict.fromkeys(found))
    home = _home(name, tree)
    return _returned(name, home, depth + 1) if home and depth < 6 else ()


def _assigned(name: str, scopes: list[Any], depth: int) -> tuple[str, ...]:
    """What the nearest scope that assigns ``name`` gives it; nothing if it does not say."""
    for scope in scopes:
        values = [
            node.value
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id == name
        ]
        if isinstance(scope, ast.Module) and not values:
            home = _home(name, scope)
            return _assigned(name, [home], depth + 1) if home else ()
        if values:
            found = [text for value in values for text in _texts(value, scopes, depth + 1)]
            return tuple(dict.fromkeys(found))
        if any(each.arg == name for each in getattr(getattr(scope, "args", None), "args", [])):
            return ()
    return ()


def tables() -> str:
    """A heading and a table for each class."""
    about = {}
    tree = ast.parse((SOURCE / "errors.py").read_text(encoding="utf-8"))
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
    return "; or ".join(known)


def _cell(text: str) -> str:
    """Of a Markdown table, shown letter by letter."""
    plain = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", escape(plain, quote=False))


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, tables()) if MARK in markdown else markdown
