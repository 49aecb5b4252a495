"""What evaluating a checkpoint found: one typed, versioned document, ``optq_eval.json`` beside it.

A later evaluation adds to it: a text of the same name and ``seqlen``, a task and the completions
take the place of what was there. What was measured against a dense model stays, though, where the
same is measured again without one.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

from pydantic import BaseModel

from optq.document import STRICT, read, written

FILE = "optq_eval.json"
VERSION = 1
BOTH = ", as the dense model does"  # how a fault ends that is the dense model's too


class _Finding(BaseModel):
    """A part of the document."""

    model_config = STRICT


class Against(_Finding):
    """The predictions beside a dense model's, over all predicted tokens of one text.

    Divergence is ``KL(dense || model)``, nats a token; ``agreement`` the share of tokens where both
    find the same next one likeliest; ``ratio`` that of the perplexities, model over dense. Errors
    are standard errors over windows, the ratio's of their paired differences (None: of one window).
    """

    dense: str  # as it was named
    perplexity: float  # the dense model's
    divergence: float
    divergence_error: float | None = None
    divergence_99_9: float  # its 99.9th percentile over tokens
    agreement: float
    agreement_error: float | None = None
    ratio: float
    ratio_error: float | None


class OnText(_Finding):
    """The paper's protocol on one text; ``losses`` are the windows' means, in nats a token."""

    text: str
    seqlen: int
    tokens: int  # that were predicted
    perplexity: float
    losses: list[float]
    against: Against | None = None


class Completed(_Finding):
    """A greedy completion, token by token as text; ``dense``: the dense model's, where both ran.

    ``fault`` is what is wrong with it as text (it repeats itself, it has invalid bytes), or None.
    """

    prompt: str
    tokens: list[str]
    dense: list[str] | None = None
    differs: int | None = None  # the first token that is not the dense model's; None: none is
    fault: str | None = None


class Findings(_Finding):
    """All that is known of one checkpoint."""

    version: int = VERSION
    optq: str  # the version that ran last
    model: str  # the folder's name
    texts: list[OnText] = []
    tasks: dict[str, dict[str, float | None]] = {}  # "piqa", or "piqa, first 100" of --limit
    completions: list[Completed] = []

    @classmethod
    def read(cls, path: Path) -> Findings:
        """What a file says. Raises :class:`ModelError` for a damaged one, or a newer version."""
        return read(cls, path, VERSION, "what was evaluated before is lost")

    def text(self) -> str:
        """What the file says."""
        return written(self)

    def with_later(self, later: Findings) -> Findings:
        """These, and what a ``later`` evaluation of the same checkpoint has found."""
        before = {(each.text, each.seqlen): each for each in self.texts}
        texts = dict(before)
        for each in later.texts:
            old = before.get((each.text, each.seqlen))
            if old and old.against and not each.against and _same(old, each):
                each = each.model_copy(update={"against": old.against})
            texts[each.text, each.seqlen] = each
        known = {(each.prompt, *each.tokens): each for each in self.completions}
        completions = [
            known.get((each.prompt, *each.tokens), each) if each.dense is None else each
            for each in later.completions
        ]
        return later.model_copy(
            update={
                "texts": list(texts.values()),
                "tasks": self.tasks | later.tasks,
                "completions": completions or self.completions,
            }
        )

    def write(self, folder: Path) -> None:
        """Into the folder of the checkpoint, whole or not at all. Raises ``OSError``."""
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="\n", dir=folder, prefix=f".{FILE}.", delete=False
        ) as file:
            try:
                file.write(self.text())
                file.close()
                # Unlike its kind it is for everyone who may read the checkpoint.
                os.chmod(file.name, (folder / "config.json").stat().st_mode)
                os.replace(file.name, folder / FILE)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def _same(old: OnText, new: OnText) -> bool:
    """Whether two measurements are of the same thing: another device adds otherwise."""
    return old.tokens == new.tokens and math.isclose(old.perplexity, new.perplexity, rel_tol=1e-3)
