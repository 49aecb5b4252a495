"""Text to token ids, and windows of them."""

from __future__ import annotations

import random

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optq.boundary import library
from optq.data.text import Text
from optq.errors import DataError


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, name: str, special: bool = True
) -> Int64[Tensor, " tokens"]:
    """The ids of ``text`` in one call, with the special tokens that the tokenizer adds by default.

    ``special=False``: with none, for text that has them already (a rendered chat template).
    Raises ``DataError``, which says ``name``, if the tokenizer does not take the text.
    """
    remedy = "look for half a surrogate pair in the text, and check the tokenizer's files"
    with library(DataError, f"the tokenizer refuses {name}", remedy):
        # verbose=False: a stream is longer than the model's context by design; no warning is due.
        encoded = tokenizer(
            text,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def require_window(text: Text, tokens: int, seqlen: int) -> None:
    """Raise ``DataError`` if ``tokens`` do not fill one sequence."""
    if tokens < seqlen:
        raise DataError(
            f"{text.name} has {tokens} tokens, fewer than one sequence of {seqlen}",
            "use a longer text, or a seqlen of at most that many tokens",
        )


def random_window(
    ids: Int64[Tensor, " tokens"], seqlen: int, generator: random.Random
) -> Int64[Tensor, " seqlen"]:
    """``seqlen`` consecutive ids from a random place.

    The GPTQ code's draw, which never ends on the last token; so a seed gives its windows. A text
    of exactly ``seqlen`` tokens, for which that code has no place to draw, is taken whole.
    """
    start = generator.randint(0, max(0, len(ids) - seqlen - 1))
    return ids[start : start + seqlen]
