"""Continue a text."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

from optq.errors import SettingError


def complete(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, longest: int | None = None
) -> Iterator[str]:
    """The pieces of the greedy continuation of ``prompt``, each as soon as it is there.

    It ends where the model's ``longest`` sequence ends. Raises ``SettingError`` for a prompt that
    is empty or leaves no room, and for less than one new token.
    """
    from transformers import TextIteratorStreamer

    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    if ids["input_ids"].shape[1] == 0:
        raise SettingError("the prompt is empty", "give at least one character")
    length = ids["input_ids"].shape[1]
    if max_new_tokens < 1:
        raise SettingError(f"max-new-tokens is {max_new_tokens}", "choose 1 or more")
    if longest is not None and length >= longest:
        raise SettingError(
            f"the prompt's {length} tokens fill the model's {longest} positions",
            "give a shorter prompt",
        )
    if longest is not None:
        max_new_tokens = min(max_new_tokens, longest - length)
    ids.pop("token_type_ids", None)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": streamer}
    failure: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**ids, **options)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
