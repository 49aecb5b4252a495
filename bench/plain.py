"""GPTQ as the paper prints it: the opponent of ``bench/solver.py``.

Algorithm 1 of Frantar et al. (ICLR 2023) in float32 PyTorch, in the form most packages carry:
invert the Hessian, take the upper Cholesky factor of the inverse, sweep the columns in blocks
with one matrix product a block. It shares no code with the package.
"""

import torch
from torch import Tensor

BLOCK = 128


def plain_gptq(
    W: Tensor, H: Tensor, wbits: int = 4, groupsize: int = 128, percdamp: float = 0.01
) -> Tensor:
    """The dequantized weights ``Q`` for ``W [rows, cols]`` under ``H [cols, cols]``, not damped.

    Symmetric min-max grids, fitted on the updated weights when the sweep reaches a group.
    ``groupsize`` divides ``BLOCK`` or is a multiple of it; -1 is one group to a row.
    """
    W, H = W.float().clone(), H.float().clone()
    columns = W.shape[1]
    groupsize = columns if groupsize == -1 else groupsize

    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    W[:, dead] = 0
    diagonal += percdamp * diagonal.mean()
    R = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True
    )  # H^-1 = R^T R

    Q = torch.empty_like(W)
    zero, top = 2 ** (wbits - 1), 2**wbits - 1
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, block_R = W[:, start:stop].clone(), R[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            j = start + i
            if j % groupsize == 0:
                updated = block[:, i:] if groupsize <= BLOCK else W[:, j:]
                scale = 2 * updated[:, :groupsize].abs().amax(1) / top
                scale[scale == 0] = 1
            w = block[:, i]
            q = scale * (torch.clamp(torch.round(w / scale) + zero, 0, top) - zero)
            error = (w - q) / block_R[i, i]
            block[:, i:] -= torch.outer(error, block_R[i, i:])
            Q[:, j] = q
            errors[:, i] = error
        W[:, stop:] -= errors @ R[start:stop, stop:]
    return Q
