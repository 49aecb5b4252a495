"""The Hessian of a site, ``H = X X^T / tokens``.

Sums are float32. Where the activations are bfloat16, their products are exact in float32, so the
CPU's bfloat16 units (AMX, AVX512-BF16) give the same sums two to three times faster; only there
is torch's reduced precision allowed. ``H`` is symmetric: only tiles on and above the
diagonal are computed. The product with the difference of two streams is held to less: see
:func:`add_drift`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from optq.core.precision import exact_products, fast_bfloat16

TILE = 256  # rows of H computed by one product: the diagonal's tiles are half wasted
TOKENS = 4096  # multiplied at a time
COPIED = 2**28  # numbers that are kept in the dtype of the sum while its parts are made


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

    def rows(self) -> Iterator[int]:
        """The first row of each part of the sum that can be made by itself."""
        yield from range(0, len(self._sum), TILE)

    def part(self, first: int) -> Float[Tensor, "rows some"]:
        """Of the sum, ``TILE`` rows from ``first`` on, and the columns from ``first`` on."""
        return self._sum[first : first + TILE, first:]

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
        for first in self.rows():
            _add_product(self.part(first), x[:, first : first + TILE], x[:, first:])


class Chunks:
    """All inputs of one site, for sums that are made part by part: :meth:`Hessian.part`.

    To each part the same products are added in the same order as by :meth:`Hessian.add`.
    """

    def __init__(
        self, inputs: Callable[[], Iterable[Float[Tensor, "tokens columns"]]], dtype: torch.dtype
    ) -> None:
        self._inputs, self._dtype = inputs, dtype
        sizes = [(len(x), x.numel(), x.dtype == torch.bfloat16) for x in inputs()]
        self.tokens = sum(tokens for tokens, _, _ in sizes)
        bfloat16 = any(each for _, _, each in sizes) and dtype == torch.float32
        self._units = "bf16" if bfloat16 else "ieee"
        self._kept: list[Tensor] | None = None
        if sum(numbers for _, numbers, _ in sizes) <= COPIED:
            self._kept = [self._convert(chunk) for chunk in self._chunks()]

    def add_to(self, part: Float[Tensor, "rows some"], first: int) -> None:
        """Add all of them to the part of the sum whose first row is ``first``."""
        with exact_products(self._units):
            for chunk in self._kept or self._chunks():
                x = self._convert(chunk[:, first:])
                _add_product(part, x[:, :TILE], x)

    def _chunks(self) -> Iterator[Tensor]:
        return (chunk for x in self._inputs() for chunk in x.split(TOKENS))

    def _convert(self, x: Tensor) -> Tensor:
        return x.to(self._dtype) if x.device.type == "cpu" else x


@exact_products()
def add_drift(
    total: Float[Tensor, "rows columns"],
    inputs: Float[Tensor, "*batch columns"],
    full: Float[Tensor, "*batch columns"],
    rows: slice = slice(None),
) -> None:
    """Add ``D X^T``, ``D = Y - X``, to ``total``: the full-precision model's inputs are ``Y``.

    ``total`` has these ``rows`` of it.

    Formed from the difference: ``Y X^T - X X^T`` would take the small from the large. Where the
    activations are bfloat16 the products, each over ``TOKENS`` tokens, are rounded to it as well,
    at twice the speed. Along strong inputs that all share (a mean of ten deviations) the rounding
    can come to a few percent of what error propagation corrects; else to less than 1e-3.
    """
    x, y = (each.reshape(-1, total.shape[1]) for each in (inputs, full))
    for chunk, other in zip(x.split(TOKENS), y.split(TOKENS), strict=True):
        if chunk.device.type != "cpu":
            _add_product(total, other[:, rows] - chunk[:, rows], chunk)
        elif chunk.dtype == torch.bfloat16 and fast_bfloat16(chunk.device):
            total += (other[:, rows] - chunk[:, rows]).T @ chunk
        else:
            chunk = chunk.to(total.dtype)
            total.addmm_((other[:, rows].to(total.dtype) - chunk[:, rows]).T, chunk)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right``, in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += torch.mm(left.T, right, out_dtype=total.dtype)
