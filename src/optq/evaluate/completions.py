"""What a model writes by itself: the damage that no number of a text shows.

A model that has lost too much falls into a loop, or writes bytes that are no characters. A handful
of prompts, English and code, are continued greedily, each by a few tokens, and such ends flagged.
Small models loop without being quantized, too: beside a dense model it is said where both do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optq.evaluate.generate import Completion, decode
from optq.findings import BOTH, Completed
from optq.model.source import positions

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "To make bread, you need",
    "def fibonacci(n):",
    "import json\n\nwith open(",
)
NEW_TOKENS = 32
LEAST = 12  # tokens of a loop, and its round three times
REPLACED = "\ufffd"  # what stands for bytes that are no character


@dataclass(frozen=True)
class Continued:
    """One prompt's greedy continuation: ``ids``, their texts, and what is wrong with it."""

    prompt: str
    ids: list[int]
    tokens: list[str]
    fault: str | None


def continued(model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS) -> list[Continued]:
    """Each prompt's; those that leave the model no position are left out."""
    found, longest = [], positions(model)
    for prompt in prompts:
        if longest is not None and len(tokenizer(prompt)["input_ids"]) >= longest:
            continue
        completion = Completion(model, tokenizer, prompt, NEW_TOKENS)
        written = _Written()
        decode(model, completion.ids, completion.max_new_tokens, written)
        start, ids = written.ids[0], [token for each in written.ids[1:] for token in each]
        while ids and ids[-1] in tokenizer.all_special_ids:  # how it says that it is done
            ids.pop()
        tokens = texts(tokenizer, start, ids)
        found.append(Continued(prompt, ids, tokens, fault(ids, "".join(tokens))))
    return found


def beside(own: Sequence[Continued], dense: Sequence[Continued] | None) -> list[Completed]:
    """For the record; with the ``dense`` model's of the same prompts, where it ran."""
    others = {each.prompt: each for each in dense or ()}
    found = []
    for each in own:
        other, wrong = others.get(each.prompt), each.fault
        if wrong and other and other.fault == wrong:
            wrong += BOTH
        differs = None if other is None else first_difference(each.ids, other.ids)
        found.append(
            Completed(
                prompt=each.prompt,
                tokens=each.tokens,
                dense=None if other is None else other.tokens,
                differs=differs,
                fault=wrong,
            )
        )
    return found


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first index where they are not the same, or one has ended; None where nowhere."""
    pairs = enumerate(zip(one, other, strict=False))
    differs = next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
    return None if differs == len(one) == len(other) else differs


def fault(ids: Sequence[int], text: str) -> str | None:
    """What is wrong with a continuation.

    A loop is an end of :data:`LEAST` tokens or more in which some run of tokens stands at least
    three times. A character that the end leaves unfinished, of up to three bytes, is no fault.
    """
    for period in range(1, len(ids) // 3 + 1):
        tail = ids[-max(3 * period, LEAST) :]
        if len(tail) >= LEAST and tail[period:] == tail[:-period]:
            return "repeats itself"
    return "has invalid bytes" if REPLACED in re.sub(f"{REPLACED}{{1,3}}$", "", text) else None


def texts(tokenizer: Any, start: list[int], ids: list[int]) -> list[str]:
    """The text that each of ``ids`` adds behind ``start``.

    A character of several tokens is the last one's.
    """

    def whole(count: int) -> str:
        return tokenizer.decode(
            start + ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    pieces, told = list[str](), whole(0)
    for count in range(1, len(ids) + 1):
        now = whole(count)
        unfinished = now.endswith(REPLACED) and count < len(ids)
        pieces.append("" if unfinished else now[len(told) :])
        told = told if unfinished else now
    return pieces


class _Written:
    """A streamer that keeps the ids: those of the prompt, then each token's."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def put(self, value: Any) -> None:
        self.ids.append(value.flatten().tolist())

    def end(self) -> None:
        pass
