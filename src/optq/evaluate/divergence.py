"""How far a model's predictions are from a dense model's, where perplexity may hide it.

A perplexity is a mean over the tokens that the text happens to have: gains here pay for losses
there. ``KL(dense || model)``, in nats, sees all of what the dense model predicts at each token, and
is 0 only where both predict the same. Its mean is over the same tokens as perplexity's; its 99.9th
percentile is the least value that 99.9% of the tokens do not exceed. Agreement is the share of
tokens where both find the same next one likeliest.

The ratio of the perplexities is ``exp(D)``, where ``D`` is the mean over windows of the difference
``d_w`` of the two losses in a window. The windows are the same for both models, so what makes some
harder than others is not in ``d_w``: the standard error of ``D``, ``std(d_w) / sqrt(windows)``, is
far less than that of either perplexity, and ``exp(D)`` times it is the ratio's (the delta method).

Vocabularies may be padded to different sizes: divergence and agreement are then those of the
predictions within what both have, brought back to a sum of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from optq.errors import NumericsError
from optq.evaluate.perplexity import Perplexity, in_batches, require_finite
from optq.model.predictions import BATCH_TOKENS, Predictions

# Logits of each model that are in float32 at one time: what a CPU's caches hold, and what keeps a
# GPU busy.
AT_ONCE = {"cpu": 2**18, "cuda": 2**25}


@dataclass(frozen=True)
class Divergence:
    """Both models' perplexities, and how far ``own`` is from ``dense``; see the module.

    Errors are standard errors over windows, None of a single one.
    """

    own: Perplexity
    dense: Perplexity
    mean: float
    mean_error: float | None
    percentile: float  # the 99.9th
    agreement: float
    agreement_error: float | None

    @property
    def ratio(self) -> float:
        """Of the perplexities, the model's over the dense one's."""
        return math.exp(self.own.nll - self.dense.nll)

    @property
    def ratio_error(self) -> float | None:
        pairs = zip(self.own.losses, self.dense.losses, strict=True)
        error = standard_error(torch.tensor([own - dense for own, dense in pairs]).double())
        return None if error is None else self.ratio * error


def divergence(
    model: PreTrainedModel,
    dense: Predictions,
    windows: Int[Tensor, "windows seqlen"],
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """The model's predictions beside those of ``dense`` on the same windows.

    Arguments and errors as of :func:`optq.evaluate.perplexity.perplexity`, whose perplexity this
    also gives. Raises ``NumericsError`` where the divergence of a token is infinite.
    """
    count, predicted = len(windows), windows.shape[1] - 1
    kl = torch.empty(count, max(predicted, 0), dtype=torch.float32)
    same = torch.empty(kl.shape, dtype=torch.bool)
    sums = torch.empty(2, count, dtype=torch.float64)

    def measured(start: int, ids: Tensor, logits: Tensor) -> int:
        beside = dense.logits(start, len(ids)).to(logits.device)
        for window in range(len(ids)):
            place = start + window
            found = _of_window(logits[window, :-1], beside[window, :-1], ids[window, 1:])
            losses = found[0].cpu().double()
            require_finite(losses[:1], place, "the model", model.dtype)
            require_finite(losses[1:], place, "the dense model", dense.head.dtype)
            sums[:, place], kl[place], same[place] = losses.sum(1), found[1].cpu(), found[2].cpu()
            if not kl[place].isfinite().all():
                raise NumericsError(
                    f"the divergence is infinite in window {place}: the model rules out what the"
                    " dense model predicts",
                    "check that both are of one model",
                )
        return start + len(ids)

    # One at a time: the dense head is not to be asked for two things at once.
    for done in in_batches(model, windows, batch_tokens, measured, threads=False):
        if progress is not None:
            progress(done, count)
    every, agrees = kl.double(), same.double()
    return Divergence(
        Perplexity.of(sums[0], predicted),
        Perplexity.of(sums[1], predicted),
        every.mean().item(),
        standard_error(every.mean(1)),
        # Not torch.quantile, which takes 16 million values at most.
        kl.flatten().kthvalue(math.ceil(0.999 * kl.numel())).values.item(),
        agrees.mean().item(),
        standard_error(agrees.mean(1)),
    )


def standard_error(windows: Float[Tensor, " windows"]) -> float | None:
    """Of the mean of the windows' values."""
    return None if len(windows) < 2 else (windows.std() / len(windows) ** 0.5).item()


def _of_window(
    own: Float[Tensor, "predicted vocabulary"],
    dense: Float[Tensor, "predicted others"],
    ids: Int[Tensor, " predicted"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses ``[2, predicted]``, ``KL(dense || own)`` and whether the likeliest are the same.

    float32, some positions at a time.
    """
    losses = torch.empty(2, len(ids), dtype=torch.float32, device=own.device)
    kl = torch.empty(len(ids), dtype=torch.float32, device=own.device)
    same = torch.empty(len(ids), dtype=torch.bool, device=own.device)
    common = min(own.shape[1], dense.shape[1])
    step = max(1, AT_ONCE.get(own.device.type, AT_ONCE["cpu"]) // common)
    for first in range(0, len(ids), step):
        some = slice(first, first + step)
        q, p = own[some].float().log_softmax(-1), dense[some].float().log_softmax(-1)
        for row, each in enumerate((q, p)):
            losses[row, some] = -each.gather(1, ids[some, None])[:, 0]
        if own.shape[1] != dense.shape[1]:
            q, p = (each[:, :common].log_softmax(-1) for each in (q, p))
        same[some] = q.max(-1).indices == p.max(-1).indices  # quicker than argmax, and the same
        kl[some] = _kl(p, q)
    return losses, kl, same


def _kl(
    p: Float[Tensor, "tokens vocabulary"], q: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """``sum_v exp(p) (p - q)`` of log-probabilities."""
    chances = p.exp()
    found = (p - q).mul_(chances).sum(-1)
    if not found.isfinite().all():  # what the dense model rules out counts for nothing
        found = torch.where(chances > 0, chances * (p - q), 0).sum(-1)
    return found
