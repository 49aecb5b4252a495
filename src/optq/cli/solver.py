"""The solver that options ask for, and the size of its groups."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from optq.cli.app import refuse_given
from optq.errors import SettingError

if TYPE_CHECKING:
    from optq.model.blocks import Block

DEFAULT_GROUPSIZE = 128
DEFAULT_WBITS = 4


def solver_of(
    method: str,
    wbits: int | None,
    budget: dict[str, Any],
    groupsize: int | None,
    plain: bool,
    options: dict[str, Any],
    abits: int | None = None,
    alpha: str | None = None,
) -> Any:
    """The solver, with those options that it has; one that it lacks must not be asked for.

    ``groupsize`` is None where none was asked for and the default will do.
    """
    from optq.budget import Mixed
    from optq.core.gptq import GPTQ
    from optq.core.methods import METHODS

    if method not in METHODS:
        raise SettingError(
            f"the method {method} is unknown", f"choose {', '.join(METHODS)} or llm-int8"
        )
    if method == "smoothquant" or abits is not None:
        asked = options | budget | {"groupsize": groupsize, "plain": plain or None}
        return _with_activations(method, wbits, abits, alpha, asked)
    groupsize = DEFAULT_GROUPSIZE if groupsize is None else groupsize
    refuse_given({"alpha": alpha}, method, "leave it out, or use --method smoothquant")
    solver, known = METHODS[method], {field.name for field in fields(METHODS[method])}
    if solver is not GPTQ:
        lacking = {name: value for name, value in options.items() if name not in known}
        refuse_given(
            lacking | {"plain": plain or None}, method, "leave it out, or use --method gptq"
        )
    given = {name: value for name, value in options.items() if value is not None}
    if any(value is not None for value in budget.values()):
        if solver is not GPTQ:
            refuse_given(budget, f"--method {method}", "leave it out, or use --method gptq")
        refuse_given({"wbits": wbits}, "a run within a budget", "leave it out: widths are chosen")
        return (Mixed.plain if plain else Mixed)(**budget, groupsize=groupsize, **given)
    build = GPTQ.plain if plain else solver
    return build(wbits=DEFAULT_WBITS if wbits is None else wbits, groupsize=groupsize, **given)


def _with_activations(
    method: str, wbits: int | None, abits: int | None, alpha: str | None, options: dict[str, Any]
) -> Any:
    """Where activations are quantized too; smoothed by ``smoothquant`` alone."""
    from optq.core.smoothquant import ROUNDING, SmoothQuant
    from optq.core.tokens import ABITS

    if method not in ("smoothquant", *ROUNDING):
        raise SettingError(
            f"the method {method} has no --abits",
            "choose smoothquant, gptq or rtn, or leave it out",
        )
    damping = options.pop("percdamp")
    same = {"sym": True, "groupsize": -1}  # as they are, with or without being asked for
    given = {name: value for name, value in options.items() if value != same.get(name)}
    refuse_given(given, "a run with --abits", "leave it out: weights have one scale to a row")
    bits: dict[str, Any] = {
        "wbits": ABITS if wbits is None else wbits,
        "abits": ABITS if abits is None else abits,
    }
    damped: dict[str, Any] = {} if damping is None else {"percdamp": damping}
    if method != "smoothquant":
        refuse_given({"alpha": alpha}, method, "leave it out, or use --method smoothquant")
        return SmoothQuant(**bits, alpha="off", rounding=method, **damped)
    try:
        strength = alpha if alpha in (None, "off") else float(alpha)
    except ValueError:
        raise SettingError(f"--alpha {alpha} is no number", 'give 0 to 1, or "off"') from None
    return SmoothQuant(**bits, alpha=strength, **damped)


def fitting_groupsize(blocks: list[Block]) -> int:
    """Where none was given: the largest of three that divides the columns of every layer."""
    columns = {layer.shape[1] for block in blocks for layer in block.layers}
    fitting = (n for n in (DEFAULT_GROUPSIZE, 64, 32) if not any(count % n for count in columns))
    return next(fitting, DEFAULT_GROUPSIZE)  # which is then refused, with what to do


def tell_groupsize(groupsize: int) -> None:
    """After the run, so that what refuses it stands alone on stderr."""
    if groupsize != DEFAULT_GROUPSIZE:
        print(f"optq: --groupsize {groupsize}: 128 does not fit every layer", file=sys.stderr)
