"""Zero-shot tasks, as the EleutherAI evaluation harness (``lm-eval``) runs and scores them.

The harness is what the literature reports, so it is called, not rewritten. It and what it needs
are large: ``pip install optq[tasks]`` brings them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optq.boundary import library
from optq.errors import DataError, OptqError, SettingError

Scores = dict[str, dict[str, float]]


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    limit: int | None = None,
) -> Scores:
    """Each task's scores by metric, for example ``{"piqa": {"acc": 0.77, "acc_norm": 0.78}}``.

    ``tasks``: names that the harness knows, or its task configurations as dicts. ``limit``: only
    so many examples of each task, for a quick look. A group of tasks has its own entry beside its
    members'. Where the harness filters answers, the filter follows the metric: ``exact_match,x``.

    Raises ``OptqError`` if the harness is not installed, ``SettingError`` if there is no task or
    ``limit`` is less than 1, ``DataError`` if a task is unknown or its data cannot be reached.
    """
    if not tasks:
        raise SettingError("there is no task to run", "name at least one, such as piqa")
    if limit is not None and limit < 1:
        raise SettingError(f"limit is {limit}", "choose 1 or more, or leave it out")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptqError(
            f"tasks are run by lm-eval, which cannot be imported: {error}",
            "run `pip install optq[tasks]`",
        ) from error
    cause = "a task cannot be run, or its data cannot be reached"
    remedy = "check the task and the network, or fetch the data beforehand"
    with library(DataError, cause, remedy):
        manager = TaskManager()
    for task in tasks:
        if isinstance(task, str) and not manager.match_tasks([task]):
            raise DataError(
                f"lm-eval has no task called {task!r}", "`lm-eval ls tasks` lists those it has"
            )
    with library(DataError, cause, remedy):
        run = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=0,  # standard errors, which are not reported here
            task_manager=manager,
        )
    return {name: _metrics(found) for name, found in run["results"].items()}


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """The scores among a task's results, whose keys are ``metric,filter``."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in found.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
