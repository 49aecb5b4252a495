"""Perplexity on windows of tokens.

``exp`` of the mean negative log-likelihood over the ``seqlen - 1`` predicted tokens of each window.
The GPTQ code multiplies each window's mean by ``seqlen`` and divides by all tokens, which is the
same mean. The model computes in its own dtype; the loss is taken in float32, a few positions at a
time (in float32 and whole, the logits of one window of 2048 tokens and a vocabulary of 128k would
be 1 GB, three times over); sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from optq.errors import DataError, NumericsError, not_finite_remedy
from optq.model.linear import QuantizedLinear
from optq.model.predictions import BATCH_TOKENS, Predictions

Found = TypeVar("Found")
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
    dtype = model.head.dtype if isinstance(model, Predictions) else model.dtype

    def measured(start: int, ids: Tensor, logits: Tensor) -> tuple[int, Tensor]:
        losses = _losses(logits, ids).cpu().double()  # not every device has float64
        require_finite(losses, start, "the model", dtype)
        return start, losses.sum(1)

    for start, some in in_batches(model, windows, batch_tokens, measured):
        sums[start : start + len(some)] = some
        if progress is not None:
            progress(start + len(some), len(windows))
    return Perplexity.of(sums, windows.shape[1] - 1)


def in_batches(
    model: PreTrainedModel | Predictions,
    windows: Int[Tensor, "windows seqlen"],
    batch_tokens: int,
    work: Callable[[int, Tensor, Tensor], Found],
    threads: bool = True,
) -> Iterator[Found]:
    """What ``work`` makes of some windows at a time, in order, until all are done.

    It is given the index of the first, the ids ``[batch, seqlen]`` and the logits ``[batch, seqlen,
    vocabulary]`` on the model's device, and may be called by several ``threads`` at once. The model
    runs in evaluation mode meanwhile. Raises ``DataError`` if nothing is to be predicted.
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
            yield work(start, ids, model.logits(start, len(ids)))
        return
    every = torch.get_num_threads()
    workers = min(at_once, every, count)
    # A thread of its own knows nothing of autocast, nor of what accelerate moves about.
    alone = torch.is_autocast_enabled("cpu") or hasattr(model, "hf_device_map")
    if not threads or alone or model.device.type != "cpu" or _is_packed(model):
        workers = 1
    workers = max(few for few in range(1, workers + 1) if every % few == 0)  # none is left idle
    some = at_once // workers

    @torch.no_grad()
    def predicted(start: int) -> Found:
        ids = windows[start : start + some].to(model.device, torch.int64)
        return work(start, ids, model(input_ids=ids, use_cache=False).logits)

    with _evaluation_mode(model):
        yield from _beside(predicted, range(0, count, some), workers)


def _beside(work: Callable[[int], Found], items: Iterable[int], workers: int) -> Iterator[Found]:
    """``map`` in ``workers`` threads, which share the cores.

    With all threads in each operator one waits for the other; and what a thread alone has under way
    fits the caches better.
    """
    if workers == 1:
        yield from map(work, items)
        return
    every = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "", torch.set_num_threads, (every // workers,))
    try:
        yield from pool.map(work, items)
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(every)  # of threads that are yet to come


def _is_packed(model: nn.Module) -> bool:
    """Whether its products have threads of their own."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


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
