"""What a site has seen: from the inputs that batches hand over to its Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optq.core.hessian import Hessian, add_drift
from optq.errors import NumericsError, not_finite_remedy


@dataclass(frozen=True)
class Inputs:
    """``H = X X^T / tokens`` of the quantized model's inputs ``X``, undamped.

    ``drift`` is ``(Y - X) X^T / tokens`` with ``Y`` the full-precision model's inputs, if they run.
    """

    H: Float[Tensor, "cols cols"]
    tokens: int
    drift: Float[Tensor, "cols cols"] | None = None


@dataclass(frozen=True)
class Handed:
    """The input that one batch brought: ``ids`` are its samples, the first one's number first."""

    first_sample: int
    ids: Int[Tensor, "samples tokens"]
    x: Float[Tensor, "*batch cols"]


def gather(
    where: str,
    columns: int,
    device: torch.device,
    quantized: list[Handed],
    full: list[Handed] | None,
) -> Inputs:
    """The inputs of a site called ``where`` in errors; ``full``: the other stream's, if it runs.

    Raises :class:`NumericsError`, which names the sample, where an input is not finite.
    """
    dtype = torch.promote_types(quantized[0].x.dtype, torch.float32)
    hessian = Hessian(columns, device, dtype)
    drift = None if full is None else torch.zeros(columns, columns, device=device, dtype=dtype)
    partners = {each.first_sample: each.x for each in full or []}
    for batch in quantized:
        hessian.add(batch.x)
        partner = partners.get(batch.first_sample)
        # Streams that took other tokens (experts) have no difference to speak of.
        if drift is not None and partner is not None and partner.shape == batch.x.shape:
            add_drift(drift, batch.x, partner)
    if drift is not None:
        drift /= max(hessian.tokens, 1)
    inputs = Inputs(hessian.matrix(), hessian.tokens, drift)
    for matrix in (inputs.H, inputs.drift):
        if matrix is not None and not torch.isfinite(matrix.sum()):
            _blame(where, [*quantized, *(full or [])])
    return inputs


def _blame(where: str, batches: list[Handed]) -> None:
    for batch in batches:
        if torch.isfinite(batch.x).all():
            continue
        samples, columns = len(batch.ids), batch.x.shape[-1]
        which = f"samples {batch.first_sample} to {batch.first_sample + samples - 1}"
        if batch.x.numel() == batch.ids.numel() * columns:  # else only some tokens came here
            bad = (~torch.isfinite(batch.x.reshape(samples, -1))).any(1).nonzero()
            which = f"sample {batch.first_sample + int(bad[0])}"
        raise NumericsError(
            f"the input of {where} holds NaN or infinity for calibration {which}",
            not_finite_remedy(batch.x.dtype),
        )
    raise NumericsError(
        f"the Hessian of {where} overflows float32",
        "leave the layer dense with --skip, or choose another calibration text",
    )
