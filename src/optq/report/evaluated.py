"""The tables of `optq eval`."""

from __future__ import annotations

from collections.abc import Sequence

from optq.findings import BOTH, Completed, Findings
from optq.report.tables import columns, plus, stdout, write

Found = Sequence[tuple[str, Findings]]  # each model as it was named, and what was found of it
SHOWN = 48  # characters of a completion


def show(found: Found, dense: str | None) -> None:
    """Perplexities, what ``dense`` says of them, scores, and completions."""
    if any(findings.texts for _, findings in found):
        _on_texts(found, dense)
    if any(findings.tasks for _, findings in found):
        _tasks(found)
    for model, findings in found:
        if findings.completions:
            _completions(model, findings.completions, dense)


def _on_texts(found: Found, dense: str | None) -> None:
    names = ["ratio", "divergence", "99.9%", "agreement"] if dense else []
    rows = columns("model", "text", "windows", "perplexity", *names, left=(0, 1))
    named, told = {model for model, _ in found}, set()
    for model, findings in found:
        for each in findings.texts:
            predicted = each.seqlen - 1
            about = [each.text, f"{each.tokens // predicted} of {each.seqlen}"]
            if each.against and each.text not in told and dense not in named:
                told.add(each.text)
                rows.add_row(each.against.dense, *about, f"{each.against.perplexity:.4f}")
            cells = []
            if far := each.against:
                cells = [
                    plus(far.ratio, far.ratio_error),
                    plus(far.divergence, far.divergence_error),
                    f"{far.divergence_99_9:.3f}",
                    f"{far.agreement:.2%}",
                ]
            rows.add_row(model, *about, f"{each.perplexity:.4f}", *cells)
    write(rows)
    if dense:
        stdout.print(f"ratio: of the perplexities, over that of {dense}", soft_wrap=True)
        stdout.print(
            f"divergence: KL({dense} || model), nats a token, its mean and 99.9th percentile",
            soft_wrap=True,
        )
        stdout.print("±: standard error over the windows, which both models read", soft_wrap=True)


def _tasks(found: Found) -> None:
    several = len(found) > 1
    rows = columns(*(["model"] if several else []), "task", "metric", "score", left=(0, 1, 2))
    for model, findings in found:
        for task, scores in findings.tasks.items():
            for metric, score in scores.items():
                told = "-" if score is None else f"{score:.4f}"
                rows.add_row(*([model] if several else []), task, metric, told)
    write(rows)


def _completions(model: str, completions: Sequence[Completed], dense: str | None) -> None:
    """What is wrong, or that nothing is; beside a dense model where they part."""
    faults = [each for each in completions if each.fault]
    shared = sum(each.fault.endswith(BOTH) for each in faults if each.fault)
    said = "nothing repeats itself or has invalid bytes"
    if faults:
        said = f"{len(faults)} of {len(completions)} end in a loop or have invalid bytes"
        if shared:
            said += f", {shared} of them as {dense}'s do"
        if dense is None:
            said += " (--against the dense model tells whether it does so too)"
    if any(each.dense is not None for each in completions):
        same = sum(each.dense is not None and each.differs is None for each in completions)
        said += f"; {same} of {len(completions)} are {dense}'s"
    stdout.print(f"completions by {model}: {said}", soft_wrap=True)
    for each in faults:
        text = repr(each.prompt + "".join(each.tokens))
        short = text if len(text) <= SHOWN else f"{text[: SHOWN - 2]}.."
        stdout.print(f"  {short}: {each.fault}", soft_wrap=True)
