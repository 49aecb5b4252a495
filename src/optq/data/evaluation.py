"""Evaluation tokens: the windows that perplexity is measured on.

The paper's protocol: the whole text is tokenized once, as one stream with the special tokens that
the tokenizer adds by default, and cut into windows that do not overlap; an incomplete last window
is dropped. No token is added at the start of a window: that would move every published number.

C4 is the exception, also in the paper: its validation file would make thousands of windows, so the
GPTQ code takes ``C4_WINDOWS`` random ones, each inside a random document that is long enough,
always with seed 0. The same draws are made here. (The code's later variant, a stream of the first
1100 documents, gives numbers that differ from the paper's tables.)
"""

from __future__ import annotations

import random

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optq.data.calibration import Drawn, windows_in_documents
from optq.data.text import read_text
from optq.data.tokens import encode, require_window
from optq.errors import SettingError

C4_WINDOWS = 256
C4_SEED = 0


def evaluation_tokens(
    spec: str, tokenizer: PreTrainedTokenizerBase, seqlen: int, progress: Drawn | None = None
) -> Int64[Tensor, "windows seqlen"]:
    """The held-out text of ``spec`` (see :mod:`optq.data.text`) in windows, on the CPU.

    ``progress(done, total)`` is called with the windows drawn, where they are. Raises ``DataError``
    if the text cannot be read or does not fill one window; ``SettingError`` if ``seqlen`` is less
    than 2, because the first token of a window is not predicted.
    """
    if seqlen < 2:
        raise SettingError(f"seqlen is {seqlen}", "choose 2 or more")
    text = read_text(spec, "evaluation")
    if text.by_document:
        generator = random.Random(C4_SEED)
        return windows_in_documents(
            text, text.string, tokenizer, True, C4_WINDOWS, seqlen, generator, progress
        )
    stream = encode(tokenizer, text.whole(), text.name)
    require_window(text, len(stream), seqlen)
    windows = len(stream) // seqlen
    return stream[: windows * seqlen].view(windows, seqlen)
