"""The Hessian of a site, ``H = X X^T / tokens``.

Sums are float32. Where the activations are bfloat16, their products are exact in float32, so the
CPU's bfloat16 units (AMX, AVX512-BF16) give the same sums two to three times faster; only there
is torch's reduced precision allowed. ``H`` is symmetric: only tiles on and above the
diagonal are computed. The product with the difference of two streams is held to less: see
:func:`add_drift`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from optq.core.precision import exact_products, fast_bfloat16

TILE = 256  # rows of H computed by one product: the diagonal's tiles are half wasted
TOKENS = 4096  # multiplied at a time


class Hessian:
    """Accumulates ``X X^T`` over the calibration batches of one site."""

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tokens = 0
        self._finished = False
        self._sum = torch.zeros(columns, columns, device=device, dtype=dtype)
        # A copy in the dtype of the sum, in memory that is touched once and then reused.
        self._copy: Tensor | None = None

    def add(self, inputs: Float[Tensor, "*batch columns"]) -> None:
        """Add one batch of inputs; each leading index is one token."""
        x = inputs.reshape(-1, len(self._sum))
        exact_in_bfloat16 = x.dtype == torch.bfloat16 and self._sum.dtype == torch.float32
        with exact_products("bf16" if exact_in_bfloat16 else "ieee"):
            for chunk in x.split(TOKENS):
                self._add(self._convert(chunk))
        self.tokens += x.shape[0]

    def matrix(self) -> Float[Tensor, "columns columns"]:
        """``X X^T / tokens``. It is the accumulator's own memory: nothing can be added later."""
        H = self._sum
        if self._finished:
            return H
        self._finished = True
        H.div_(max(self.tokens, 1))
        for start in range(0, len(H), TILE):
            stop = start + TILE
            corner = H[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
            H[stop:, start:stop] = H[start:stop, stop:].T
        return H

    def _convert(self, chunk: Tensor) -> Tensor:
        if chunk.device.type != "cpu":
            return chunk  # a GPU multiplies in their own dtype and returns float32 sums
        if self._copy is None or len(self._copy) < len(chunk):
            self._copy = torch.empty(len(chunk), len(self._sum), dtype=self._sum.dtype)
        return self._copy[: len(chunk)].copy_(chunk)

    def _add(self, x: Tensor) -> None:
        for start in range(0, len(self._sum), TILE):
            _add_product(
                self._sum[start : start + TILE, start:], x[:, start : start + TILE], x[:, start:]
            )


@exact_products()
def add_drift(
    total: Float[Tensor, "columns columns"],
    inputs: Float[Tensor, "*batch columns"],
    full: Float[Tensor, "*batch columns"],
) -> None:
    """Add ``D X^T``, ``D = Y - X``, to ``total``: the full-precision model's inputs are ``Y``.

    Formed from the difference: ``Y X^T - X X^T`` would take the small from the large. Where the
    activations are bfloat16 the products, each over ``TOKENS`` tokens, are rounded to it as well,
    at twice the speed. Along strong inputs that all share (a mean of ten deviations) the rounding
    can come to a few percent of what error propagation corrects; else to less than 1e-3.
    """
    x, y = (each.reshape(-1, len(total)) for each in (inputs, full))
    for chunk, other in zip(x.split(TOKENS), y.split(TOKENS), strict=True):
        if chunk.device.type != "cpu":
            _add_product(total, other - chunk, chunk)
        elif chunk.dtype == torch.bfloat16 and fast_bfloat16(chunk.device):
            total += (other - chunk).T @ chunk
        else:
            chunk = chunk.to(total.dtype)
            total.addmm_((other.to(total.dtype) - chunk).T, chunk)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right``, in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += torch.mm(left.T, right, out_dtype=total.dtype)
