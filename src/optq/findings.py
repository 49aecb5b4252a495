"""What evaluating a checkpoint found: one typed, versioned document, ``optq_eval.json`` beside it.

A later evaluation adds to it: a text of the same name and ``seqlen``, a task and the completions
take the place of what was there.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from optq.errors import ModelError

FILE = "optq_eval.json"
VERSION = 1


class Against(BaseModel):
    """The predictions beside a dense model's, over all predicted tokens of one text.

    Divergence is ``KL(dense || model)``, nats a token; ``agreement`` the share of tokens where both
    find the same next one likeliest; ``ratio`` that of the perplexities, model over dense, and
    ``ratio_error`` its standard error, of the windows' paired differences (None: of one window).
    """

    model_config = ConfigDict(frozen=True)

    dense: str  # as it was named
    perplexity: float  # the dense model's
    divergence: float
    divergence_99_9: float  # its 99.9th percentile over tokens
    agreement: float
    ratio: float
    ratio_error: float | None


class OnText(BaseModel):
    """The paper's protocol on one text; ``losses`` are the windows' means, in nats a token."""

    model_config = ConfigDict(frozen=True)

    text: str
    seqlen: int
    tokens: int  # that were predicted
    perplexity: float
    losses: list[float]
    against: Against | None = None


class Completed(BaseModel):
    """A greedy completion, token by token as text; ``dense``: the dense model's, where both ran.

    ``fault`` is what is wrong with it as text (it repeats itself, it has invalid bytes), or None.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    tokens: list[str]
    dense: list[str] | None = None
    differs: int | None = None  # the first token that is not the dense model's; None: none is
    fault: str | None = None


class Findings(BaseModel):
    """All that is known of one checkpoint."""

    version: int = VERSION
    optq: str  # the version that ran last
    model: str  # the folder's name
    texts: list[OnText] = []
    tasks: dict[str, dict[str, float | None]] = {}
    completions: list[Completed] = []

    @classmethod
    def read(cls, path: Path) -> Findings:
        """What a file says. Raises :class:`ModelError` for a damaged one, or a newer version."""
        lost = "what was evaluated before is lost"
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            if made.get("version", VERSION) > VERSION:
                raise ModelError(
                    f"{path} is of version {made['version']}, newer than this OPTQ",
                    f"update OPTQ, or delete the file: {lost}",
                )
            return cls.model_validate(made)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is damaged", f"delete it: {lost}") from error

    def text(self) -> str:
        """What the file says."""
        return json.dumps(self.model_dump(), indent=2) + "\n"
