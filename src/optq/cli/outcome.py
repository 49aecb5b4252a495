"""What a command says of a run: what it would do, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optq.cli.app import print_json


def of_plan(plan: Any, settings: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """For ``--dry-run``; ``settings`` are for a program. Raises what a run would refuse."""
    from optq.report import steps, tables

    print_json({**settings, **plan.told()}) if as_json else tables.planned(plan)
    plan.check(out)
    if not as_json:
        steps.show("the same command without --dry-run")


def as_object(result: Any, settings: Mapping[str, Any]) -> None:
    """The one JSON object of a run that is done."""
    from optq.report import tables

    tuned, distilled = result.record.tuned, result.record.distilled
    timed = [layer.model_dump() | {"seconds": layer.seconds} for layer in result.layers]
    sizes = {"bits_per_weight": result.bits_per_weight, "bytes": result.bytes}
    chosen = {} if result.choices is None else {"choices": tables.chosen(result.choices)}
    ran: dict[str, Any] = {"tuned": [each.model_dump() for each in tuned]}
    ran |= {"distilled": distilled and distilled.model_dump()}
    rest = ran | {"seconds": result.seconds, "layers": timed}
    print_json({**settings, **sizes, **chosen, **rest})


def as_tables(result: Any, out: Path, form: str, what: str, baseline: str, calib: str) -> None:
    """The same for a person; ``what`` became of the layers, and what their error is beside."""
    from optq.report import said, tables

    record, seed = result.record, result.record.calibration.get("seed")
    made, tuned, distilled = record.calibration, record.tuned, record.distilled
    weights = sum(layer.rows * layer.cols for layer in result.layers)
    total, other = (
        sum(getattr(layer, name) for layer in result.layers) for name in ("error", "rtn_error")
    )
    tables.stages(result.seconds)
    tables.facts(
        {
            "wrote": f"{out}  ({form}, {result.bits_per_weight:.2f} bits per weight)",
            "layers": f"{len(result.layers)} {what}, {tables.size(result.bytes)} for"
            f" {weights / 1e6:.1f} million weights; {len(result.dense)} linear layers left dense",
            "error": (f"{total / other:.0%} of {baseline}'s" if other else "0")
            + (", before it was tuned" if record.tune else ""),
            **said.short_of_tokens([layer.model_dump() for layer in result.layers]),
            **said.smoothed(record.sites),
            **said.held(result.activations),
            **said.tuned(tuned, distilled),
            "calibrated": f"on {calib}, {made['samples']} x {made['seqlen']} tokens, seed {seed}",
        }
    )


def next_steps(out: Path, model: str, calib: str) -> None:
    """What to do with what was written."""
    from optq.report import steps

    text = ("--text", "demo") if calib == "demo" else ()
    after = ("eval", out, "--against", model, *text), ("inspect", out), ("generate", out, "PROMPT")
    steps.show(", or ".join(steps.command(*words) for words in after))
