"""Calibration tokens: what the Hessians are made of.

The paper's recipe. For C4: draw documents until one has more tokens than a sequence, take a random
window in it, and again for the next sample. For any other text: one stream of tokens, random
windows of it. Windows may overlap. The same seed gives the windows of the GPTQ code, draw by draw.
C4's recipe is not used for other sets: their documents (lines, sentences) are shorter than a
sequence.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Int64
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optq.data.text import Document, Text, read_text, require_text
from optq.data.tokens import encode, random_window, require_window
from optq.errors import DataError, SettingError

Encode = Callable[[Document, int], Int64[Tensor, " tokens"]]  # a document and its number


def calibration_tokens(
    spec: str | Tensor,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat: bool = False,
) -> Int64[Tensor, "samples seqlen"]:
    """``nsamples`` windows of ``seqlen`` token ids, on the CPU; the same seed gives the same ids.

    ``spec`` names a text (see :mod:`optq.data.text`), or is the token ids themselves,
    ``[samples, seqlen]`` of any integer dtype: those are taken as they are, and the other
    arguments do not matter.

    ``chat``: each document goes through the tokenizer's chat template, as the one message of a
    user; a conversation (``messages`` of a ``.jsonl`` record, or a column of them) as it is.

    Raises ``DataError`` if the text cannot be read or is shorter than one sequence, if ids are not
    integers in two dimensions, if a chat template is missing or refuses a conversation;
    ``SettingError`` if ``nsamples`` or ``seqlen`` is less than 1.
    """
    if isinstance(spec, Tensor):
        return _checked(spec)
    for name, value in (("nsamples", nsamples), ("seqlen", seqlen)):
        if value < 1:
            raise SettingError(f"{name} is {value}", "choose 1 or more")
    if chat and not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template",
            "leave out --chat, or take the tokenizer of an instruction-tuned model",
        )
    text = read_text(spec, "calibration", chat)
    generator = random.Random(seed)
    if text.by_document:
        return windows_in_documents(
            text, _encoder(text, tokenizer, chat), nsamples, seqlen, generator
        )
    if chat:
        rendered = (
            _render(text, tokenizer, document, index)
            for index, document in enumerate(text.documents)
        )
        # A template brings its own separators, and its own special tokens.
        stream = encode(tokenizer, require_text(text.name, "".join(rendered)), special=False)
    else:
        stream = encode(tokenizer, text.whole())
    require_window(text, len(stream), seqlen)
    return torch.stack([random_window(stream, seqlen, generator) for _ in range(nsamples)])


def windows_in_documents(
    text: Text, encode_document: Encode, nsamples: int, seqlen: int, generator: random.Random
) -> Int64[Tensor, "samples seqlen"]:
    """Random windows, each inside a random document of more than ``seqlen`` tokens.

    Raises ``DataError`` once every document has turned out to be too short.
    """
    windows: list[Tensor] = []
    too_short: set[int] = set()
    longest = 0
    while len(windows) < nsamples:
        index = generator.randint(0, len(text.documents) - 1)
        if index in too_short:
            continue
        ids = encode_document(text.documents[index], index)
        if len(ids) > seqlen:
            windows.append(random_window(ids, seqlen, generator))
            continue
        too_short.add(index)
        longest = max(longest, len(ids))
        if len(too_short) == len(text.documents):
            raise DataError(
                f"no document of {text.name} has more than {seqlen} tokens; "
                f"the longest has {longest}",
                "choose a smaller seqlen or another text",
            )
    return torch.stack(windows)


def _encoder(text: Text, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Encode:
    if chat:
        render = partial(_render, text, tokenizer)
        return lambda document, index: encode(tokenizer, render(document, index), special=False)
    return lambda document, index: encode(tokenizer, text.string(document, index))


def _render(text: Text, tokenizer: PreTrainedTokenizerBase, document: Document, index: int) -> str:
    """One document in the chat template's own words; nothing for a blank one."""
    if isinstance(document, list):
        whole = all(isinstance(message, dict) and "role" in message for message in document)
        if not document or not whole:
            raise DataError(
                f"{text.name}: record {index + 1} is not a list of messages, each with a role",
                'write messages like {"role": "user", "content": "..."}',
            )
        conversation = document
    elif text.string(document, index).strip():
        conversation = [{"role": "user", "content": document}]
    else:
        return ""
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except TemplateError as error:
        raise DataError(
            f"{text.name}: the chat template refuses record {index + 1}: {error}",
            "correct the conversation, or leave out --chat",
        ) from error


def _checked(ids: Tensor) -> Int64[Tensor, "samples seqlen"]:
    integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or ids.numel() == 0 or not integer:
        raise DataError(
            f"calibration ids are {ids.dtype} of shape {list(ids.shape)}",
            "pass integers of shape [samples, seqlen]",
        )
    return ids.long()
