"""What every kernel builds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from optq.errors import ModelError


class Product(nn.Module, ABC):
    """``x @ W.T`` for a packed ``W [rows, cols]``; its buffers are all that it keeps of ``W``."""

    name: str  # the kernel's

    def __init__(self, rows: int, cols: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.cols, self.dtype = rows, cols, dtype

    def keep(self, name: str, tensor: Tensor | None) -> None:
        """A buffer that is not in the module's state dict."""
        self.register_buffer(name, tensor, persistent=False)

    @abstractmethod
    def dense(self) -> Tensor:
        """``W [rows, cols]``, columns in the layer's own order, in the activations' dtype."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, cols]`` to ``[tokens, rows]``, in the dtype of ``x``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Product:
        """``.to``, ``.half``, ..: the activations' dtype may change, what is packed may not."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(buffer.new_empty(0)).device
                if device.type != buffer.device.type:
                    raise ModelError(
                        f"the weights are packed for {buffer.device.type}, not for {device.type}",
                        "load the model again, on that device",
                    )
                self._buffers[name] = buffer.to(device)
                self.dtype = fn(buffer.new_empty(0, dtype=self.dtype)).dtype
        return self


def compact(scales: Tensor) -> Tensor:
    """The scales in the smallest dtype that holds them exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        short = scales.to(dtype)
        if torch.equal(short.to(scales.dtype), scales):
            return short
    return scales
