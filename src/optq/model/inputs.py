"""What a site has seen: from the inputs that batches hand over to its Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optq.core.hessian import TOKENS, Hessian, add_drift
from optq.errors import NumericsError, not_finite_remedy


@dataclass(frozen=True)
class SiteSums:
    """``H = X X^T / tokens`` of the quantized model's inputs ``X``, undamped.

    ``drift`` is ``(Y - X) X^T / tokens`` with ``Y`` the full-precision model's inputs, if they run.
    A token of ``X`` that ``Y`` lacks, or that cannot be told from others, counts as not drifted:
    the layer's aim for it is what it makes of ``X``. So both divide by all tokens of ``X``.
    """

    H: Float[Tensor, "cols cols"]
    tokens: int
    drift: Float[Tensor, "cols cols"] | None = None
    borrowed: int = 0  # tokens of others that stand in for those that an expert lacks

    def with_others(self, other: SiteSums, enough: int, free: int) -> SiteSums:
        """The same, where tokens are few, with those of ``other`` for what lacks of ``enough``.

        ``free`` of these are not among its own.
        """
        lack = enough - self.tokens
        if lack <= 0 or free <= 0:
            return self
        share = self.tokens / enough
        drift = None if self.drift is None else self.drift * share
        H = share * self.H + (1 - share) * other.H.to(self.H.dtype)
        return SiteSums(H, self.tokens, drift, min(lack, free))


@dataclass(frozen=True)
class HandedExperts:
    """What one batch brought to experts: the block's tokens, and those of each that has any."""

    every: Handed
    of: dict[int, Handed]


@dataclass(frozen=True)
class Handed:
    """The input that one batch brought: ``ids`` are its samples, the first one's number first.

    ``tokens`` says which of the batch's tokens each row of a routed input is, none of them twice.
    ``copy`` makes that input out of ``x``, anew each time, where all experts' would fill the
    memory.
    """

    first_sample: int
    ids: Int[Tensor, "samples tokens"]
    x: Float[Tensor, "*batch cols"]
    tokens: Int[Tensor, " rows"] | None = None
    copy: Callable[[], Float[Tensor, "rows cols"]] | None = None

    @property
    def inputs(self) -> Float[Tensor, "rows cols"]:
        """One row for each token."""
        return self.x.reshape(-1, self.x.shape[-1]) if self.copy is None else self.copy()

    def rows(self) -> Int[Tensor, " rows"] | None:
        """The token of each row: as told, or all in order; None where only some came, unnamed."""
        if self.tokens is None and self.x.numel() == self.ids.numel() * self.x.shape[-1]:
            return torch.arange(self.ids.numel(), device=self.x.device)
        return self.tokens


def gather(
    where: str,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
    quantized: list[Handed],
    full: list[Handed] | None,
) -> SiteSums:
    """The sums of a site called ``where`` in errors; ``full``: the other stream's, if it runs.

    Raises :class:`NumericsError`, which names the sample, where an input is not finite.
    """
    hessian = Hessian(columns, device, dtype)
    drift = None if full is None else torch.zeros(columns, columns, device=device, dtype=dtype)
    partners = {each.first_sample: each for each in full or []}
    for inputs, x, y in _pieces(quantized, partners, device):
        hessian.add(inputs)
        if drift is not None and len(x):
            add_drift(drift, x, y)
    if drift is not None:
        drift /= max(hessian.tokens, 1)
    sums = SiteSums(hessian.matrix(), hessian.tokens, drift)
    for matrix in (sums.H, sums.drift):
        if matrix is not None and not torch.isfinite(matrix.sum()):
            _blame(where, [*quantized, *(full or [])])
    return sums


def _pieces(
    batches: list[Handed], partners: dict[int, Handed], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The inputs, and those of the same tokens in both streams; of experts, many batches' at once.

    A few rows at a time would cost more in adding matrices up than in multiplying.
    """
    few: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        inputs, partner = batch.inputs.to(device), partners.get(batch.first_sample)
        none = inputs[:0]
        piece = (inputs, *(_common(batch, inputs, partner) if partner else (none, none)))
        if batch.tokens is None:
            yield piece
            continue
        few.append(piece)
        if sum(len(inputs) for inputs, _, _ in few) >= TOKENS:
            yield _cat(few)
            few = []
    if few:
        yield _cat(few)


def _cat(pieces: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    inputs, x, y = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return inputs, x, y


def _common(batch: Handed, x: Tensor, partner: Handed) -> tuple[Tensor, Tensor]:
    """The rows of both that are the same tokens, in the same order; ``x`` are the first one's."""
    y = partner.inputs.to(x.device)
    mine, theirs = batch.rows(), partner.rows()
    if mine is None or theirs is None:
        return x[:0], y[:0]
    if batch.tokens is None and partner.tokens is None:
        return x, y
    mine, theirs = mine.to(x.device), theirs.to(x.device)
    row_of = torch.full((batch.ids.numel(),), -1, device=x.device)
    row_of[theirs] = torch.arange(len(theirs), device=x.device)
    rows = row_of[mine]
    return x[rows >= 0], y[rows[rows >= 0]]


def _blame(where: str, batches: list[Handed]) -> None:
    for batch in batches:
        inputs = batch.inputs
        if torch.isfinite(inputs).all():
            continue
        which = f"samples {batch.first_sample} to {batch.first_sample + len(batch.ids) - 1}"
        rows = batch.rows()
        if rows is not None:
            bad = rows[(~torch.isfinite(inputs)).any(1)].min()
            which = f"sample {batch.first_sample + int(bad) // batch.ids.shape[1]}"
        raise NumericsError(
            f"the input of {where} holds NaN or infinity for calibration {which}",
            not_finite_remedy(batch.x.dtype),
        )
    raise NumericsError(
        f"the Hessian of {where} overflows float32",
        "leave the layer dense with --skip, or choose another calibration text",
    )
