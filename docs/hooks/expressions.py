"""What an expression of the package's source can be, as far as the source says it.

Names are followed to what is assigned to them, functions to what they return, pairs of texts
through the loops and calls that hand them on. For ``messages.py``.
"""

import ast
import copy
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src" / "optq"
ANY = "…"  # what a run puts in
DEPTH = 6


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def calls(node: ast.AST, scopes: list[Any]) -> Iterator[tuple[ast.Call, list[Any]]]:
    for child in ast.iter_child_nodes(node):
        inside = [child, *scopes] if isinstance(child, ast.FunctionDef) else scopes
        if isinstance(child, ast.Call):
            yield child, inside
        yield from calls(child, inside)


Pair = tuple[ast.expr, ast.expr | None, list[Any]]


def each_pair(
    cause: ast.expr, remedy: ast.expr | None, scopes: list[Any], depth: int = 0
) -> Iterator[Pair]:
    """Cause and remedy where they belong together: once for each tuple of a loop that names them,
    and for each call of the private function that is given them. With the scopes of their names.
    """
    here = scopes[0]
    names = {n.id for x in (cause, remedy) if x for n in ast.walk(x) if isinstance(n, ast.Name)}
    if isinstance(here, ast.FunctionDef) and depth < DEPTH:
        for targets, values in _loops(here):
            if names & set(targets):
                for value in values:
                    bound = dict(zip(targets, value.elts, strict=True))
                    pair = _put(cause, bound), remedy and _put(remedy, bound)
                    yield from each_pair(*pair, scopes, depth + 1)
                return
        parameters = [each.arg for each in here.args.args]
        if here.name.startswith("_") and getattr(remedy, "id", "") in parameters:
            for bound, around in _given(here.name, parameters, scopes[-1]):
                pair = _put(cause, bound), remedy and _put(remedy, bound)
                yield from each_pair(*pair, around, depth + 1)
            return
    yield cause, remedy, scopes


def _loops(scope: ast.AST) -> Iterator[tuple[list[str], list[ast.Tuple]]]:
    """``for a, b in ((.., ..), (.., ..))``: the names, and the tuples that they go through."""
    for node in ast.walk(scope):
        if isinstance(node, ast.For) and isinstance(node.target, ast.Tuple):
            values = node.iter.elts if isinstance(node.iter, ast.Tuple) else [node.iter]
            if all(isinstance(each, ast.Tuple) for each in values):
                yield [ast.unparse(each) for each in node.target.elts], values  # type: ignore[misc]


def _given(
    name: str, parameters: list[str], tree: ast.Module
) -> Iterator[tuple[dict[str, ast.expr], list[Any]]]:
    """What each call in the module gives a function; ``*some`` is what a function returned."""
    for call, scopes in calls(tree, [tree]):
        if getattr(call.func, "id", "") != name:
            continue
        *first, last = call.args
        if not isinstance(last, ast.Starred):
            yield dict(zip(parameters, call.args, strict=False)), scopes
            continue
        for node in ast.walk(scopes[0]):
            if isinstance(node, ast.NamedExpr) and node.target.id == ast.unparse(last.value):
                for value, inside in _tuples(getattr(node.value, "func", None), tree):
                    yield dict(zip(parameters, [*first, *value.elts], strict=False)), inside


def _tuples(
    function: ast.expr | None, tree: ast.Module, depth: int = 0
) -> Iterator[tuple[ast.Tuple, list[Any]]]:
    """The tuples that a function of this module, or an imported one, returns, and its scopes."""
    name = getattr(function, "id", "")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for each in ast.walk(node):
                if isinstance(each, ast.Return) and isinstance(each.value, ast.Tuple):
                    yield each.value, [node, tree]
            return
    if (home := _home(name, tree)) and depth < DEPTH:
        yield from _tuples(function, home, depth + 1)


class _Put(ast.NodeTransformer):
    def __init__(self, bound: dict[str, ast.expr]) -> None:
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.bound.get(node.id, node)


def _put(node: ast.expr, bound: dict[str, ast.expr]) -> ast.expr:
    """``node`` with expressions in the place of names."""
    return _Put(bound).visit(copy.deepcopy(node))


def texts_of(node: ast.expr | None, scopes: list[Any], depth: int = 0) -> tuple[str, ...]:
    """The texts that an expression can be, as far as the source says."""
    unknown = (ANY,)
    if depth > DEPTH or node is None:
        return unknown
    if isinstance(node, ast.Constant):  # a number is where a count starts, or what stands for none
        return (node.value,) if isinstance(node.value, str) else unknown
    if isinstance(node, ast.JoinedStr):
        parts = [
            (str(v.value),) if isinstance(v, ast.Constant) else _inserted(v, scopes, depth)
            for v in node.values
        ]
        return tuple("".join(each) for each in product(*parts))
    if isinstance(node, ast.IfExp):
        both = (texts_of(each, scopes, depth + 1) for each in (node.body, node.orelse))
        return tuple(dict.fromkeys(text for texts in both for text in texts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pair = (texts_of(each, scopes, depth + 1) for each in (node.left, node.right))
        return tuple("".join(each) for each in product(*pair))
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("replace", "removeprefix"):
        return texts_of(node.func.value, scopes, depth + 1)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _returned(node.func.id, scopes[-1], depth) or unknown
    if isinstance(node, ast.Name):
        return _assigned(node.id, scopes, depth) or unknown
    return unknown


def _inserted(node: ast.expr, scopes: list[Any], depth: int) -> tuple[str, ...]:
    """What stands in the braces of an f-string: a text only if it is a choice of texts."""
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.Name | ast.IfExp | ast.Constant | ast.JoinedStr):
        texts = texts_of(value, scopes, depth + 1)
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
            return tree_of(file) if file else None
    return None


def _returned(name: str, tree: ast.Module, depth: int) -> tuple[str, ...]:
    """The texts that a function of this module, or an imported one, returns."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            values = [each.value for each in ast.walk(node) if isinstance(each, ast.Return)]
            found = [text for value in values for text in texts_of(value, [node, tree], depth + 1)]
            return tuple(dict.fromkeys(found))
    home = _home(name, tree)
    return _returned(name, home, depth + 1) if home and depth < DEPTH else ()


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
        if parts := _unpacked(name, scope, scopes):
            found = [text for value, own in parts for text in texts_of(value, own, depth + 1)]
            return tuple(dict.fromkeys(found))
        if isinstance(scope, ast.Module) and not values:
            home = _home(name, scope)
            return _assigned(name, [home], depth + 1) if home else ()
        if values:
            found = [text for value in values for text in texts_of(value, scopes, depth + 1)]
            return tuple(dict.fromkeys(found))
        if any(each.arg == name for each in getattr(getattr(scope, "args", None), "args", [])):
            return ()
    return ()


def _unpacked(name: str, scope: ast.AST, scopes: list[Any]) -> list[tuple[ast.expr, list[Any]]]:
    """What ``name`` gets where it is one of several that are assigned at once, and the scopes."""
    found: list[tuple[ast.expr, list[Any]]] = []
    for node in ast.walk(scope):
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        names = [ast.unparse(each) for each in getattr(target, "elts", [])]
        if not isinstance(node, ast.Assign) or name not in names:
            continue
        value = node.value
        known = [(value, scopes)] if isinstance(value, ast.Tuple) else []
        known += _tuples(getattr(value, "func", None), scopes[-1])
        place = names.index(name)
        found += [(each.elts[place], own) for each, own in known if len(each.elts) == len(names)]
    return found
