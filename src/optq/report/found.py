"""What was found of a checkpoint, by name: for :func:`optq.report.tables.facts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lines_of(found: Mapping[str, Any]) -> dict[str, str]:
    """What `optq eval` has left beside a checkpoint, text by text and task by task.

    ``found`` is an :class:`optq.findings.Findings` as a mapping, or a part of it.
    """
    lines = dict[str, str]()
    for each in found.get("texts", ()):
        said = f"{each['perplexity']:.4f} in windows of {each['seqlen']} tokens"
        if far := each["against"]:
            said += (
                f", {far['ratio']:.4f} times that of {far['dense']}:"
                f" divergence {far['divergence']:.4f}, agreement {far['agreement']:.2%}"
            )
        name = f"perplexity on {each['text']}"
        lines[name] = f"{lines[name]}; {said}" if name in lines else said
    for task, scores in found.get("tasks", {}).items():
        told = (
            f"{name} {'-' if score is None else f'{score:.4f}'}" for name, score in scores.items()
        )
        lines[task] = ", ".join(told)
    return lines
