"""The command eval: how much worse a model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optq.cli import imports
from optq.cli.app import app, print_json, refuse_given, say, words
from optq.cli.options import Device, Dtype, Json, Seqlen

if TYPE_CHECKING:
    from optq.findings import Findings, OnText


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Folders, hub ids, or 'demo'.")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="One or more, with commas between, each as --calib of quantize. Default:"
            " wikitext2; demo where the demo model is among the models."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The dense model: how far predictions are from its, beside perplexity."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks of lm-eval (piqa,arc_easy,..); of a text too if named."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task at most.")] = None,
    seqlen: Seqlen = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Perplexity of each MODEL, quantized or not, by the paper's protocol; its scores in tasks.

    With --against, how far its predictions are from the dense model's, too.
    Of a quantized or pruned model in a folder, optq_eval.json keeps what was found.
    --json: model, text, seqlen, tokens, perplexity, against, tasks, completions,
    the last three where there are any. Of several models or texts: a list,
    models, of model, texts (of text, seqlen, ..), tasks and completions.
    """
    from optq.report import evaluated, progress, steps

    if tasks is None:
        refuse_given({"limit": limit}, "eval without --tasks", "name tasks, or leave it out")
    elif text is None and against is None:
        refuse_given({"seqlen": seqlen}, "eval of --tasks alone", "add --text, or leave it out")
    with progress.bar("optq eval") as bar:
        bar(0, 1, "starting")
        if tasks is None:  # lm-eval may want what is left out there
            imports.load()
        from optq.config import ModelConfig
        from optq.evaluate.tasks import ZeroShot
        from optq.evaluation import Evaluation

        shots = None if tasks is None else ZeroShot(words("--tasks", tasks), limit)
        configs = [ModelConfig(name, device, dtype) for name in models]
        dense = None if against is None else ModelConfig(against, device, dtype)
        texts = []
        if text is not None:
            texts = words("--text", text)
        elif tasks is None or against is not None:
            is_demo = any(config.is_demo for config in (*configs, *([dense] if dense else [])))
            texts = ["demo" if is_demo else "wikitext2"]
        found = Evaluation(configs, texts, dense, seqlen, shots, bar, say).run()
    if as_json:
        every = [_told(each.model, each.findings) for each in found]
        print_json(_flat(every[0]) if len(every) == 1 and len(texts) < 2 else {"models": every})
        return
    evaluated.show([(each.model, each.findings) for each in found], against)
    made = [each.model for each in found if each.made]
    steps.show(steps.after_evaluation([each.model for each in found], made, against))


def _told(model: str, findings: Findings) -> dict[str, Any]:
    """What a program is told of one model."""
    told: dict[str, Any] = {"model": model}
    if findings.texts:
        told["texts"] = [_text(each) for each in findings.texts]
    if findings.tasks:
        told["tasks"] = findings.tasks
    if findings.completions:
        told["completions"] = [each.model_dump() for each in findings.completions]
    return told


def _text(found: OnText) -> dict[str, Any]:
    told = found.model_dump(exclude={"losses", "against"})
    return told if found.against is None else told | {"against": found.against.model_dump()}


def _flat(told: dict[str, Any]) -> dict[str, Any]:
    """Of one model on one text there is one level."""
    texts = told.pop("texts", [{}])
    return {"model": told.pop("model"), **texts[0], **told}
