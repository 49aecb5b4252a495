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
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optq.boundary import library
from optq.data.text import Document, Text, read_text, require_text
from optq.data.tokens import encode, random_window, require_window
from optq.errors import DataError, SettingError
from optq.model.checkpoint import Checkpoint
from optq.model.source import check_vocabulary, load_tokenizer, sequence_length

Strings = Callable[[Document, int], str]  # a document and its number
Drawn = Callable[[int, int], None]  # how many windows, and of how many
ADDED = 16  # tokens that a tokenizer may put around a text of none: special ones, a prefix


def tokens_for(
    model: Any,
    checkpoint: Checkpoint,
    calib: str | Text | Tensor,
    nsamples: int,
    seqlen: int | None,
    seed: int,
    chat: bool,
    progress: Drawn | None,
) -> Tensor:
    """The calibration of a run, as :func:`calibration_tokens`; ids that ``model`` can read."""
    if isinstance(calib, Tensor):
        tokens = calibration_tokens(calib, None, 1, 1, seed)
        sequence_length(model, tokens.shape[1])
    else:
        length, tokenizer = sequence_length(model, seqlen), load_tokenizer(checkpoint)
        tokens = calibration_tokens(calib, tokenizer, nsamples, length, seed, chat, progress)
    check_vocabulary(model, tokens)
    return tokens


def calibration_tokens(
    spec: str | Text | Tensor,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat: bool = False,
    progress: Drawn | None = None,
) -> Int64[Tensor, "samples seqlen"]:
    """``nsamples`` windows of ``seqlen`` token ids, on the CPU; the same seed gives the same ids.

    ``spec`` names a text (see :mod:`optq.data.text`), is one, or is the token ids themselves,
    ``[samples, seqlen]`` of any integer dtype: those are taken as they are, and the other
    arguments do not matter.

    ``chat``: each document goes through the tokenizer's chat template, as the one message of a
    user; a conversation (``messages`` of a ``.jsonl`` record, or a column of them) as it is.
    ``progress(done, total)`` is called with the windows drawn, where documents are searched.

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
    text = spec if isinstance(spec, Text) else read_text(spec, "calibration", chat)
    strings = partial(_render, text, tokenizer) if chat else text.string
    generator = random.Random(seed)
    special = not chat  # a template brings its own special tokens, and its own separators
    if text.by_document:
        return windows_in_documents(
            text, strings, tokenizer, special, nsamples, seqlen, generator, progress
        )
    joint = "" if chat else text.joint
    whole = joint.join(strings(document, index) for index, document in enumerate(text.documents))
    stream = encode(tokenizer, require_text(text.name, whole), text.name, special)
    require_window(text, len(stream), seqlen)
    return torch.stack([random_window(stream, seqlen, generator) for _ in range(nsamples)])


def windows_in_documents(
    text: Text,
    strings: Strings,
    tokenizer: PreTrainedTokenizerBase,
    special: bool,
    nsamples: int,
    seqlen: int,
    generator: random.Random,
    progress: Drawn | None = None,
) -> Int64[Tensor, "samples seqlen"]:
    """Random windows, each inside a random document of more than ``seqlen`` tokens.

    A document of fewer bytes than that is drawn as any other, but not tokenized: a token stands for
    one byte at least. Raises ``DataError`` once every document has turned out to be too short.
    """

    def ids_of(index: int, string: str) -> Tensor:
        return encode(tokenizer, string, f"record {index + 1} of {text.name}", special)

    windows: list[Tensor] = []
    too_short: dict[int, int] = {}  # and the most tokens that each may have
    while len(windows) < nsamples:
        index = generator.randint(0, len(text.documents) - 1)
        if index in too_short:
            continue
        string = strings(text.documents[index], index)
        tokens = len(string.encode("utf-8", "surrogatepass")) + ADDED
        if tokens > seqlen:
            ids = ids_of(index, string)
            tokens = len(ids)
        if tokens > seqlen:
            windows.append(random_window(ids, seqlen, generator))
            if progress is not None:
                progress(len(windows), nsamples)
            continue
        too_short[index] = tokens
        if len(too_short) == len(text.documents):
            longest = 0
            for index in sorted(too_short, key=lambda index: -too_short[index]):
                if too_short[index] > longest:
                    string = strings(text.documents[index], index)
                    longest = max(longest, len(ids_of(index, string)))
            raise DataError(
                f"no document of {text.name} has more than {seqlen} tokens; "
                f"the longest has {longest}",
                "choose a smaller seqlen or another text",
            )
    return torch.stack(windows)


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
    cause = f"{text.name}: the chat template refuses record {index + 1}"
    remedy = "correct the conversation, or leave out --chat"

    def rendered(conversation: list[dict[str, Any]]) -> str:
        with library(DataError, cause, remedy):
            whole = str(tokenizer.apply_chat_template(conversation, tokenize=False))
        # A template made for strings may print a list of parts, as Python does, and not fail.
        lists = [each["content"] for each in conversation if isinstance(each.get("content"), list)]
        if any(parts and str(parts) in whole for parts in lists):
            raise DataError(f"{cause}, whose content is a list", remedy)
        return whole

    try:
        return rendered(conversation)
    except DataError:
        joined = [_joined(message) for message in conversation]
        if joined == conversation:
            raise
    return rendered(joined)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its typed parts as one string; as it is where one of them is no text."""
    parts = message.get("content")
    texts = [
        part.get("text") if isinstance(part, dict) else part
        for part in (parts if isinstance(parts, list) else [None])
    ]
    if not all(isinstance(text, str) for text in texts):
        return message
    return message | {"content": "".join(map(str, texts))}


def _checked(ids: Tensor) -> Int64[Tensor, "samples seqlen"]:
    integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or ids.numel() == 0 or not integer:
        raise DataError(
            f"calibration ids are {ids.dtype} of shape {list(ids.shape)}",
            "pass integers of shape [samples, seqlen]",
        )
    return ids.long()
