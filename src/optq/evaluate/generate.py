"""Continue a text, and say how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from optq.errors import SettingError
from optq.evaluate.graph import GraphDecoder, capturable
from optq.model.source import check_vocabulary, positions


@dataclass(frozen=True)
class Speed:
    """Seconds until the first new token, and tokens per second after it."""

    prompt: int  # tokens
    new: int
    first: float
    rate: float

    def __str__(self) -> str:
        rate = f", then {self.rate:.1f} tokens/s" if self.new > 1 else ""
        return f"{self.prompt} tokens read in {self.first:.2f} s{rate}"


@dataclass
class Completion:
    """The greedy continuation of ``prompt``, piece by piece as it comes.

    It ends at an end-of-text token, after ``max_new_tokens``, or where the model has no more
    positions. Raises ``SettingError`` for a prompt that is empty or leaves no room, and for less
    than one new token.
    """

    model: Any
    tokenizer: Any
    prompt: str
    max_new_tokens: int
    arrivals: list[float] = field(default_factory=list)  # seconds: the start, then each token

    def __post_init__(self) -> None:
        self.ids = self.tokenizer(self.prompt, return_tensors="pt").to(self.model.device)
        self.ids.pop("token_type_ids", None)
        length, longest = self.ids["input_ids"].shape[1], positions(self.model)
        if length == 0:
            raise SettingError("the prompt is empty", "give at least one character")
        check_vocabulary(self.model, self.ids["input_ids"])
        if self.max_new_tokens < 1:
            raise SettingError(f"max-new-tokens is {self.max_new_tokens}", "choose 1 or more")
        if longest is not None and length >= longest:
            raise SettingError(
                f"the prompt's {length} tokens fill the model's {longest} positions",
                "give a shorter prompt",
            )
        if longest is not None:
            self.max_new_tokens = min(self.max_new_tokens, longest - length)

    @property
    def speed(self) -> Speed:
        """Of what has come so far."""
        start, first, *_, last = (*self.arrivals, self.arrivals[-1])
        new = len(self.arrivals) - 1
        rate = (new - 1) / (last - first) if last > first else 0.0
        return Speed(self.ids["input_ids"].shape[1], new, first - start, rate)

    def run(self, show: Callable[[str], object]) -> str:
        """The whole text; ``show`` gets each piece as it comes, and may end it by an exception."""
        from transformers import TextStreamer

        self.arrivals.clear()
        arrivals, pieces = self.arrivals, list[str]()

        class Streamer(TextStreamer):
            def put(self, value: Any) -> None:
                arrivals.append(time.perf_counter())
                super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                show(text)

        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        decode(self.model, self.ids, self.max_new_tokens, streamer)
        return "".join(pieces)


def decode(
    model: Any, inputs: dict[str, Any], new_tokens: int, streamer: Any, ends: bool = True
) -> None:
    """Give ``streamer`` the prompt's ids and then each greedy token; ``ends``: the last may come
    early. transformers' own loop, except on a GPU where the model allows a graph to a token.
    """
    from transformers import GenerationConfig

    own = model.generation_config  # whose penalties, beams and samples are not greedy
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    plain = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=None if ends else new_tokens,
        **{name: getattr(own, name) for name in names},
    )
    if model.device.type != "cuda" or not capturable(model):
        try:
            model.generation_config = plain
            model.generate(**inputs, streamer=streamer)
        finally:
            model.generation_config = own
        return
    ids, last = inputs["input_ids"], plain.eos_token_id
    last = {last} if isinstance(last, int) else {*(last or ())}
    decoder = GraphDecoder(model, ids.shape[1] + new_tokens)
    decoder.prefill(ids[:, :1])  # captures the step, which is no part of reading the prompt
    streamer.put(ids.cpu())
    logits = decoder.prefill(ids)
    for remaining in reversed(range(new_tokens)):
        token = logits.argmax().view(1)
        streamer.put(token.cpu())
        if remaining == 0 or (ends and int(token) in last):
            break
        logits = decoder.step(token)
    streamer.end()
