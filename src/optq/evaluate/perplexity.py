"""Perplexity on windows of tokens.

``exp`` of the mean negative log-likelihood over the ``seqlen - 1`` predicted tokens of each window.
The GPTQ code multiplies each window's mean by ``seqlen`` and divides by all tokens, which is the
same mean. The model computes in its own dtype; the loss is taken in float32, a few positions at a
time (in float32 and whole, the logits of one window of 2048 tokens and a vocabulary of 128k would
be 1 GB, three times over); sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from optq.errors import DataError, NumericsError, not_finite_remedy
from optq.model.predictions import BATCH_TOKENS, Predictions

POSITIONS = 256  # whose float32 logits are held at one time


@dataclass(frozen=True)
class Perplexity:
    """``perplexity = exp(nll)``; ``nll`` is the mean in nats over ``tokens`` predicted tokens.

    ``losses`` are the means of the windows.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    losses: tuple[float, ...]

    @classmethod
    def of(cls, sums: Float64[Tensor, " windows"], predicted: int) -> Perplexity:
        """From the windows' sums over ``predicted`` tokens each, on the CPU.

        Raises ``NumericsError`` if it is infinite.
        """
        tokens = len(sums) * predicted
        nll = sum(sums.tolist()) / tokens
        # torch's exp, because Python's raises above 709.
        value = torch.tensor(nll, dtype=torch.float64).exp().item()
        if not math.isfinite(value):
            raise NumericsError(
                f"the perplexity is beyond floating point: the mean loss is {nll:.4g} nats",
                "check that tokenizer and weights belong together",
            )
        return cls(value, nll, tokens, len(sums), tuple((sums / predicted).tolist()))


def perplexity(
    model: PreTrainedModel | Predictions,
    windows: Int[Tensor, "windows seqlen"],
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The model's perplexity on token ids, or that of what is kept of one; ``seqlen`` is 2 or more.

    ``batch_tokens``: about as many tokens go through the model at once, one window at least.
    ``progress(done, total)`` is called with windows after each batch. The model runs in evaluation
    mode and gets its modes back.

    Raises ``NumericsError`` if a predicted token's loss is NaN or infinite, and names its window,
    and if the perplexity is infinite; ``DataError`` if nothing is to be predicted.
    """
    sums = torch.empty(len(windows), dtype=torch.float64)
    for start, ids, logits in in_batches(model, windows, batch_tokens):
        losses = _losses(logits, ids).cpu().double()  # not every device has float64
        del logits  # before the next ones are made
        sums[start : start + len(ids)] = losses.sum(1)
        dtype = model.head.dtype if isinstance(model, Predictions) else model.dtype
        require_finite(losses, start, "the model", dtype)
        if progress is not None:
            progress(start + len(ids), len(windows))
    return Perplexity.of(sums, windows.shape[1] - 1)


def in_batches(
    model: PreTrainedModel | Predictions, windows: Int[Tensor, "windows seqlen"], batch_tokens: int
) -> Iterator[tuple[int, Int[Tensor, "batch seqlen"], Float[Tensor, "batch seqlen vocabulary"]]]:
    """The index of the first, the ids and the logits of some windows, until all are done.

    Ids and logits are on the model's device, which runs in evaluation mode meanwhile. Raises
    ``DataError`` if nothing is to be predicted.
    """
    count, seqlen = windows.shape
    if count == 0 or seqlen < 2:
        raise DataError(
            f"{count} windows of {seqlen} tokens leave nothing to predict",
            "use at least one window of 2 tokens",
        )
    at_once = max(1, batch_tokens // seqlen)
    if isinstance(model, Predictions):
        for start in range(0, count, at_once):
            ids = windows[start : start + at_once].to(model.head.device, torch.int64)
            yield start, ids, model.logits(start, len(ids))
        return
    with _evaluation_mode(model):
        for start in range(0, count, at_once):
            ids = windows[start : start + at_once].to(model.device, torch.int64)
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            yield start, ids, logits
            del logits


def require_finite(
    losses: Float[Tensor, "batch predicted"], start: int, whose: str, dtype: torch.dtype
) -> None:
    """Raises ``NumericsError`` that names the window, counted from ``start``."""
    for window, finite in enumerate(losses.isfinite().all(1).tolist(), start=start):
        if not finite:
            raise NumericsError(
                f"{whose}'s logits are not finite in window {window}", not_finite_remedy(dtype)
            )


def _losses(
    logits: Float[Tensor, "batch seqlen vocabulary"], ids: Int[Tensor, "batch seqlen"]
) -> Float[Tensor, "batch predicted"]:
    """Negative log-likelihoods, float32, of every token but the first of each window."""
    losses = torch.empty(ids[:, 1:].shape, dtype=torch.float32, device=logits.device)
    ids = ids.to(logits.device)
    for window in range(len(ids)):
        for start in range(0, ids.shape[1] - 1, POSITIONS):
            stop = min(start + POSITIONS, ids.shape[1] - 1)
            losses[window, start:stop] = cross_entropy(
                logits[window, start:stop].float(),
                ids[window, start + 1 : stop + 1],
                reduction="none",
            )
    return losses


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
