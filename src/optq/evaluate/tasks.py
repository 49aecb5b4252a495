"""Zero-shot tasks, as the EleutherAI evaluation harness (``lm-eval``) runs and scores them.

The harness is what the literature reports, so it is called, not rewritten. It and what it needs
are large: ``pip install lm-eval accelerate`` brings them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optq.boundary import library
from optq.errors import DataError, OptqError, SettingError

CAUSE = "a task cannot be run, or its data cannot be reached"
REMEDY = "check the task and the network, or fetch the data beforehand"
Scores = dict[str, dict[str, float | None]]  # None: the harness gave no finite number


@dataclass
class ZeroShot:
    """Tasks to run on a model, checked before the model is there.

    ``tasks``: names that the harness knows, or its task configurations as dicts. ``limit``: only
    so many examples of each task, for a quick look.

    Raises ``OptqError`` if the harness is not installed, ``SettingError`` if there is no task or
    ``limit`` is less than 1, ``DataError`` if a task is unknown.
    """

    tasks: Sequence[str | dict[str, Any]]
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise SettingError("there is no task to run", "name at least one, such as piqa")
        if self.limit is not None and self.limit < 1:
            raise SettingError(f"limit is {self.limit}", "choose 1 or more, or leave it out")
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise OptqError(
                f"tasks are run by lm-eval, which cannot be imported: {error}",
                "run `pip install lm-eval accelerate`",
            ) from error
        with library(DataError, CAUSE, REMEDY):
            self.evaluate, self.wrap, self.manager = simple_evaluate, HFLM, TaskManager()
        for task in self.tasks:
            if isinstance(task, str) and not self.manager.match_tasks([task]):
                raise DataError(
                    f"lm-eval has no task called {task!r}", "`lm-eval ls tasks` lists those it has"
                )

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
        """Each task's scores by metric, for example ``{"piqa": {"acc": 0.77, "acc_norm": 0.78}}``.

        A group of tasks has its own entry beside its members'. Where the harness filters answers,
        the filter follows the metric: ``exact_match,x``. Raises ``DataError`` if a task's data
        cannot be reached.
        """
        with library(DataError, CAUSE, REMEDY):
            run = self.evaluate(
                model=self.wrap(pretrained=model, tokenizer=tokenizer),
                tasks=list(self.tasks),
                num_fewshot=0,
                limit=self.limit,
                bootstrap_iters=0,  # standard errors, which are not reported here
                task_manager=self.manager,
            )
        return {name: _metrics(found) for name, found in run["results"].items()}


def _metrics(found: dict[str, Any]) -> dict[str, float | None]:
    """The scores among a task's results, whose keys are ``metric,filter``."""
    return {
        key.removesuffix(",none"): float(value) if math.isfinite(value) else None
        for key, value in found.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
