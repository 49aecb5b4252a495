"""What is said of a run that is done, by name: for :func:`optq.report.tables.facts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optq.record import DistillRecord, SiteRecord, TunedBlock
from optq.report.tables import expert_in, size


def short_of_tokens(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How many experts calibration brought no token, or too few; nothing where all had enough."""
    experts: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if found := expert_in(record["name"]):
            experts.setdefault(f"{found[1]}.{found[2]}", []).append(record)
    none = sum(all(each["tokens"] == 0 for each in parts) for parts in experts.values())
    few = sum(any(each["borrowed"] for each in parts) for parts in experts.values())
    said = f"{none} of {len(experts)} saw no token, {few} borrowed some of their block's"
    return {"experts": said} if none or few else {}


def smoothed(sites: Sequence[SiteRecord]) -> dict[str, str]:
    """How many inputs were smoothed, and what for; nothing where activations are not quantized."""
    made = [site.smoothing for site in sites if site.smoothing is not None]
    if not made:
        return {}
    done = [each for each in made if each.alpha is not None and each.error and each.plain_error]
    shares = sorted(each.error / each.plain_error for each in done)  # type: ignore[operator]
    said = f"{len(done)} of {len(made)} inputs"
    if shares:
        said += f", their products' error {shares[len(shares) // 2]:.0%} of what it would be"
    return {"smoothed": said}


def held(most: Mapping[str, int]) -> dict[str, str]:
    """Where batches kept what they held; nothing where all of it stayed on the device."""
    places = {"memory": "in memory", "host": "in host memory", "files": "in files"}
    found = [f"{size(most[name])} {where}" for name, where in places.items() if most.get(name)]
    return {"activations": ", ".join(found)} if len(found) > 1 else {}


def gained(block: TunedBlock) -> str:
    """What tuning one block has given."""
    if not block.kept or not block.before or block.after is None:
        return f"stays as it was{f': {block.note}' if block.note else ''}"
    return f"tuned: error {block.after / block.before:.0%} of what it was"


def tuned(blocks: Sequence[TunedBlock], model: DistillRecord | None) -> dict[str, str]:
    """What tuning has given; nothing where nothing was tuned."""
    said = {}
    if blocks:
        kept = [b.after / b.before for b in blocks if b.kept and b.before and b.after is not None]
        mean = f": {sum(kept) / len(kept):.0%} of their error is left" if kept else ""
        said["blocks"] = f"{len(kept)} of {len(blocks)} gained on samples held back{mean}"
        if notes := [f"{block.block}: {block.note}" for block in blocks if block.note]:
            said["blocks"] += f" ({notes[0]})"
    if model is not None:
        ends = f"{model.steps} steps" + (f" ({model.note})" if model.note else "")
        before, after = (
            "no number" if far is None else f"{far:.4f}" for far in (model.before, model.after)
        )
        said["scales"] = (
            f"tuned in {ends}: divergence {before} to {after} on samples held back"
            if model.kept
            else f"as they were: nothing was gained in {ends} on a divergence of {before}"
        )
    return said


def exported(out: object, made: Mapping[str, Any]) -> dict[str, str]:
    """What :func:`optq.formats.gguf.export_gguf` gives."""
    said = {
        "wrote": f"{out}  (gguf, {size(made['bytes'])})",
        "tensors": ", ".join(f"{count} {kind}" for kind, count in made["tensors"].items()),
    }
    if moved := made["minimum_moved"]:
        said["minima"] = f"rounded to float16, which moves them by {moved:.3f} of a step at most"
    if left := made.get("left_out"):
        said["left out"] = ", ".join(left)
    return said
