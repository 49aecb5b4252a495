"""The first screen: how large, how much worse, which layer is worst, who loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optq.record import RunRecord, Times
from optq.report import steps
from optq.report.page import completions, layers, warnings
from optq.report.page.known import Known
from optq.report.tables import duration, size

ANSWERS = {True: "yes", False: "no", None: "unknown"}


def of(known: Known, name: str) -> dict[str, Any]:
    """What is said of one checkpoint in words and numbers, ready to be shown."""
    record = known.record
    return {
        "name": name,
        "place": known.place,
        "made": _made(known),
        "size": _size(known),
        "quality": _quality(known),
        "recorded": record is not None,
        "tuned": bool(record and record.tune),
        "worst": [] if record is None else layers.worst(record, 5),
        "typical": None if record is None else layers.typical(record),
        "readers": [
            {**reader, "answer": ANSWERS[reader["loads"]]} for reader in known.what["loads"]
        ],
        "warnings": warnings.of(known),
        "settings": _settings(known),
        "time": known.times and share_of_factor(known.times),
        "measured": _measured(known),
        "completions": completions.of(known.findings),
    }


def _made(known: Known) -> str:
    record, what = known.record, known.what
    if record is None:
        bits = f", {what['bits']} bits" if "bits" in what else ""
        return f"{what['format']}{bits}; there is no record of the run"
    quantizer, text = record.quantizer, record.calibration
    group = quantizer.get("groupsize", -1)
    groups = "one scale to a row" if group == -1 else f"groups of {group}"
    calib = f"calibrated on {text['text']}, {text['samples']} x {text['seqlen']} tokens"
    if not {"text", "samples", "seqlen"} <= text.keys():
        calib = "calibrated"
    sparsity = quantizer.get("sparsity")
    pruned = () if sparsity is None else (removed(sparsity),)
    coded = (layers.widths(record), groups) if is_quantized(known) else ()
    called = ", ".join((record.method.upper(), *pruned, *coded))
    head = f", head at {record.head} bits" if record.head else ""
    abits = quantizer.get("abits")
    head += f", activations at {abits} bits" if abits else ""
    model = f"{Path(known.times.model).name}: " if known.times else ""
    return f"{model}{called}{head}; {calib}; " + (
        f"format {what['format']}" if coded else "not quantized"
    )


def removed(sparsity: float | str) -> str:
    """A pattern as it is written; of a share what goes."""
    return sparsity if isinstance(sparsity, str) else f"{sparsity:.0%} removed"


def is_quantized(known: Known) -> bool:
    """Whether its weights are; not those that were pruned alone."""
    return "unread" in known.what or "quantized_layers" in known.what


def _size(known: Known) -> dict[str, Any]:
    after, before = known.what["bytes"], known.before
    packed = known.what.get("quantized_bytes")
    bits = known.record.bits_per_weight if known.record and is_quantized(known) else None
    if bits is None and known.weights and packed:
        bits = 8 * packed / known.weights
    parts = ""
    if packed:
        parts = f"{in_short(packed)} of it in {known.what['quantized_layers']} quantized layers"
    how = f"read from {known.dense}" if known.exact else "reckoned from shapes"
    return {
        "after": in_short(after),
        "before": None if before is None else in_short(before),
        "share": None if not before else after / before,
        "bits": bits,
        "zeros": known.record and known.record.zeros,
        "parts": parts,
        "how": how,
    }


def in_short(count: float) -> str:
    """Bytes with three digits."""
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else size(count)


def _quality(known: Known) -> dict[str, Any]:
    text, record = known.main_text, known.record
    errors = [] if record is None else [b.error for b in record.blocks if b.error is not None]
    return {
        "text": text,
        "against": text and text.against,
        "full": text and known.full_on(text),
        "ratio": text and known.ratio_on(text),
        "stream": errors[-1] if errors else None,
        "command": command_to_measure(known),
        "unread": known.what.get("unread"),
    }


def command_to_measure(known: Known) -> str | None:
    """How to measure what was lost; None where that is done, or where it cannot be."""
    text = known.main_text
    if "unread" in known.what or (text is not None and known.full_on(text) is not None):
        return None
    dense = known.dense or (known.times.model if known.times else "DENSE")
    calib = known.record.calibration.get("text") if known.record else None
    on = ("--text", "demo") if "demo" in (dense, calib) else ()
    return steps.command("eval", known.place, "--against", dense, *on)


def _settings(known: Known) -> dict[str, str]:
    """Names and values for the table at the end of the page."""
    found = {"folder": known.place, "architecture": str(known.what["architecture"])}
    record, times = known.record, known.times
    if record is not None:
        found |= {"OPTQ": record.optq, "method": record.method}
        found |= {name: str(value) for name, value in record.quantizer.items()}
        found["error propagation"] = _told(record.qep) if record.qep else "no"
        found["calibration"] = _told(record.calibration)
        if record.tune:
            found["tuned"] = ", ".join(name for name, value in record.tune.items() if value)
        if record.distilled and record.distilled.before and record.distilled.after:
            both = record.distilled.before, record.distilled.after
            found["scales, tuned together"] = "divergence {:.4f} to {:.4f}".format(*both)
    else:
        names = ("format", "bits", "group_size", "sym", "desc_act")
        found |= {name: str(known.what[name]) for name in names if name in known.what}
    if times is not None:
        found |= {"device": f"{times.device}, {times.threads} threads", "model": times.model}
    return found


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def share_of_factor(times: Times) -> str:
    """One sentence on where the time went, and on what the factorization takes of it."""
    seconds, total = times.seconds, times.seconds.get("total") or 0.0
    if not total or "factor" not in seconds:
        return ""
    factor, sweep = seconds["factor"], seconds.get("solve", 0.0)
    return (
        f"Factorizing the Hessians took {factor / total:.1%} of the run"
        f" ({_seconds(factor)} of {_seconds(total)}); the sweeps over the columns took"
        f" {sweep / total:.1%}, the forward passes {seconds.get('forward', 0.0) / total:.1%}."
    )


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else duration(value)


def stages(times: Times) -> list[dict[str, Any]]:
    """Seconds by stage, the longest first, with what no stage accounts for."""
    parts = {name: value for name, value in times.seconds.items() if name != "total"}
    parts["other"] = max(times.seconds.get("total", 0.0) - sum(parts.values()), 0.0)
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    return [{"stage": name, "seconds": round(value, 3)} for name, value in ranked if value > 0]


def _measured(known: Known) -> dict[str, Any]:
    findings = known.findings
    if findings is None:
        return {"texts": [], "tasks": []}
    tasks = [
        {"task": task, "metric": metric, "score": score}
        for task, scores in findings.tasks.items()
        for metric, score in scores.items()
    ]
    texts = [
        {"of": text, "full": known.full_on(text), "ratio": known.ratio_on(text)}
        for text in findings.texts
    ]
    return {"texts": texts, "tasks": tasks}


def depth(record: RunRecord, name: str) -> list[dict[str, Any]]:
    """The error of the hidden states behind each block, of blocks where both streams ran."""
    return [
        {"checkpoint": name, "block": index, "error": float(f"{block.error:.4g}")}
        for index, block in enumerate(record.blocks)
        if block.error is not None
    ]
