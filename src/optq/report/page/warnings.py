"""What a person should look at before a checkpoint is used, worst first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optq.findings import BOTH
from optq.record import MANY, LayerRecord, RunRecord
from optq.report.page.known import Known
from optq.report.page.words import percent, significant
from optq.report.said import short_of_tokens

POOR = 0.2  # relative error of a layer: its output is another one
WORSE = 1.5  # a perplexity over full precision's: it shows in what the model says
ALIKE = 0.6  # share of next tokens that are full precision's: below it, it is another model
FAR = 0.5  # of hidden states behind the last block: little is left of the model's own


def of(known: Known) -> list[str]:
    """A line each; nothing where all is well."""
    found = _of_texts(known) + _of_findings(known)
    if known.record is None:
        return found
    return found + _of_record(known.record)


def _of_texts(known: Known) -> list[str]:
    """A line for each text on which the model is far from full precision."""
    found = []
    for text in known.findings.texts if known.findings else ():
        said, ratio = [], known.ratio_on(text)
        if ratio is not None and not ratio <= WORSE:
            said.append(f"perplexity is {significant(ratio)} times full precision's")
        if text.against and not text.against.agreement >= ALIKE:
            same = percent(text.against.agreement, 2)
            said.append(f"only {same} of the next tokens are those of full precision")
        if said:
            found.append(f"on {text.text}, {', and '.join(said)}")
    return found


def _of_findings(known: Known) -> list[str]:
    if known.findings is None:
        return []
    completions = known.findings.completions
    faults = [each for each in completions if each.fault and not each.fault.endswith(BOTH)]
    if not faults:  # that are the quantized model's own
        return []
    of_all = f"{len(faults)} of {len(completions)} completions"
    return [f"{of_all} went wrong, first on {_short(faults[0].prompt)}: {faults[0].fault}"]


def _of_record(record: RunRecord) -> list[str]:
    layers, found = record.layers, []
    pruned = record.zeros is not None
    removed = "are removed by their size" if pruned else "are rounded"
    baseline = "magnitude" if pruned else "rounding"

    def some(what: str, holds: Callable[[LayerRecord], bool], by: str) -> None:
        """``what`` of the layers for which it holds, and the one with the most."""
        there = [layer for layer in layers if holds(layer)]
        if there:
            most = max(there, key=lambda layer: getattr(layer, by) / layer_size(layer, by))
            found.append(f"{_count(there)} {what}: {_most(most, by)}")

    last = record.blocks[-1].error if record.blocks else None
    if last is not None and last > FAR:
        found.append(
            f"hidden states behind the last block are {last:.0%} off: expect another model"
        )
    some("with a relative error above 20%", lambda x: x.relative_error > POOR, "relative_error")
    some(
        f"had inputs that no calibration token reached, and those weights {removed}",
        lambda x: x.dead_columns > MANY * x.cols,
        "dead_columns",
    )
    some(
        "needed more damping than asked for: their Hessians would not factor (too little text?)",
        lambda x: x.damp_tries > 0,
        "damp_tries",
    )
    found += [f"experts: {said}" for said in short_of_tokens_of(layers)]
    some(
        f"with rows that fell back to {baseline}, which served them better",
        lambda x: x.fallback_rows > 0.01 * x.rows,
        "fallback_rows",
    )
    some("ran more than once in a forward: calibrated on the first", lambda x: x.calls > 1, "calls")
    notes = [block.note for block in record.tuned if block.note]
    if notes:
        blocks = "1 block" if len(notes) == 1 else f"{len(notes)} blocks"
        found.append(f"tuning of {blocks} ended early: {notes[0]}")
    if record.distilled and not record.distilled.kept:
        why = f": {record.distilled.note}" if record.distilled.note else ""
        found.append(f"tuning the scales of the whole model gained nothing, and was undone{why}")
    if record.dense:
        names = ", ".join(record.dense[:2]) + (", .." if len(record.dense) > 2 else "")
        many = len(record.dense)
        stay = (
            "1 linear layer inside the blocks stays"
            if many == 1
            else (f"{many} linear layers inside the blocks stay")
        )
        found.append(f"{stay} dense: {names}")
    return found


def short_of_tokens_of(layers: Sequence[LayerRecord]) -> list[str]:
    """What is said of experts that calibration brought too little."""
    if not any(layer.borrowed or not layer.tokens for layer in layers):
        return []
    return list(short_of_tokens([layer.model_dump() for layer in layers]).values())


def layer_size(layer: LayerRecord, by: str) -> int:
    """What a count of one layer is a share of."""
    return {"dead_columns": layer.cols, "fallback_rows": layer.rows}.get(by, 1)


def _most(layer: LayerRecord, by: str) -> str:
    value = getattr(layer, by)
    if by == "relative_error":
        return f"{layer.name} {value:.0%}"
    whole = layer_size(layer, by)
    return f"{layer.name} {value}" + (f" of {whole}" if whole > 1 else "")


def _count(layers: Sequence[LayerRecord]) -> str:
    return "1 layer" if len(layers) == 1 else f"{len(layers)} layers"


def _short(prompt: str) -> str:
    words = " ".join(prompt.split())
    return f"“{words[:40]}{'..' if len(words) > 40 else ''}”"
