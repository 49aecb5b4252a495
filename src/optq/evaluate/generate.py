"""Continue a text."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

from optq.errors import SettingError


def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """The pieces of the greedy continuation of ``prompt``, each as soon as it is there."""
    from transformers import TextIteratorStreamer

    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    if ids["input_ids"].shape[1] == 0:
        raise SettingError("the prompt is empty", "give at least one character")
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
