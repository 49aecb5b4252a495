"""Several checkpoints side by side: only what was measured alike is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from optq.findings import OnText
from optq.report.page.known import Known, Several

Text = tuple[str, int, int]  # its name, the window, and the tokens that were predicted


def of(several: Several) -> dict[str, Any]:
    """``rows``: what was measured of each on one text, in windows of one length; ``on`` says which,
    ``against`` beside which dense model. ``missing``: whether one was not measured so.
    """
    on = _common(several.every)
    texts = [_on(each, on) for each in several.every]
    denses = Counter(text.against.dense for text in texts if text and text.against)
    dense = denses.most_common(1)[0][0] if denses else None
    rows = [_row(*each, dense) for each in zip(several.every, texts, strict=True)]
    return {
        "on": None if on is None else f"{on[0]}, windows of {on[1]}",
        "against": dense,
        "rows": rows,
        "missing": on is not None and None in texts,
        "calibrated": _calibrated(several),
    }


def _key(text: OnText) -> Text:
    return text.text, text.seqlen, text.tokens


def _common(every: Sequence[Known]) -> Text | None:
    """That of the most checkpoints; of several, of the most with the same dense model."""
    texts = [(_key(text), text) for each in every if each.findings for text in each.findings.texts]
    counts = Counter(key for key, _ in texts)
    both = Counter((key, text.against.dense) for key, text in texts if text.against)

    def rank(key: Text) -> tuple[int, int]:
        return counts[key], max((n for (k, _), n in both.items() if k == key), default=0)

    return max(counts, key=rank, default=None)  # the first of equals


def _on(known: Known, on: Text | None) -> OnText | None:
    texts = known.findings.texts if known.findings else []
    return next((text for text in texts if _key(text) == on), None)


def _row(known: Known, text: OnText | None, dense: str | None) -> dict[str, Any]:
    against = text.against if text and text.against and text.against.dense == dense else None
    ratio = None
    if against:
        ratio = against.ratio
    elif text and not text.against:
        ratio = known.ratio_on(text)
    return {
        "perplexity": text and text.perplexity,
        "ratio": ratio,
        "ratio_error": against and against.ratio_error,
        "against": against,
    }


def _calibrated(several: Several) -> str | None:
    """A word where errors by layer are not of the same calibration."""
    there = [
        (name, each.record)
        for each, name in zip(several.every, several.names, strict=True)
        if each.record is not None
    ]
    said = []
    for name, record in there[1:]:
        first = there[0][1]
        what = _differences(first.calibration, record.calibration)
        if first.qep != record.qep:
            what.append("error propagation")
        if what:
            said.append(f"{name} ({', '.join(what)})")
    if not said:
        return None
    return (
        "Errors by layer are relative to each run's own inputs. Not calibrated as"
        f" {there[0][0]} was: {'; '.join(said)}. Their errors compare roughly only."
    )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {other[name]}, not {one[name]}"
        for name in one  # older records name fewer
        if name in other and one[name] != other[name]
    ]
