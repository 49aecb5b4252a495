"""Weights and Hessians for the tests: ordinary ones, and the kinds that break solvers."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

HESSIANS = (
    "correlated",
    "diagonal",
    "few tokens",
    "duplicates",
    "ill-conditioned",
    "far from zero",
    "outlier inputs",
    "dead columns",
    "zero",
)
WEIGHTS = (
    "normal",
    "constant rows",
    "positive",
    "negative",
    "outliers",
    "zeros",
    "tiny",
    "one value",
)


@dataclass
class Problem:
    """One weight ``[rows, cols]`` and the Hessian of its inputs, float64."""

    W: np.ndarray
    H: np.ndarray
    name: str

    def __repr__(self):
        return self.name

    def tensors(self, dtype=torch.float64):
        return torch.tensor(self.W, dtype=dtype), torch.tensor(self.H, dtype=dtype)


def inputs(kind, cols, rng):
    """``[tokens, cols]``: calibration inputs of one kind."""
    tokens = 4 * cols + 4
    X = rng.normal(size=(tokens, cols)) @ (np.eye(cols) + 0.5 * rng.normal(size=(cols, cols)))
    X *= np.exp(0.5 * rng.normal(size=cols))
    some = rng.random(cols) < 0.3
    if kind == "few tokens":
        X = X[: max(1, cols // 3)]
    elif kind == "duplicates":
        X[:, some] = X[:, :1]
    elif kind == "ill-conditioned":
        basis = np.linalg.qr(rng.normal(size=(cols, cols)))[0]
        X = X / np.sqrt(tokens) @ np.diag(np.logspace(0, -8, cols)) @ basis
    elif kind == "far from zero":
        X += 20 * rng.normal(size=cols)
    elif kind == "outlier inputs":
        X[:, some] *= 1e4
    elif kind == "dead columns":
        X[:, some] = 0
        X[:, 0] = 0
    elif kind == "zero":
        X[:] = 0
    return X


def weights(kind, rows, cols, rng):
    """``[rows, cols]``: a weight of one kind."""
    W = rng.normal(size=(rows, cols))
    if kind == "constant rows":
        W[:] = W[:, :1]
    elif kind == "positive":
        W = np.abs(W) + 0.5
    elif kind == "negative":
        W = -np.abs(W) - 0.5
    elif kind == "outliers":
        W[rng.random(W.shape) < 0.1] *= 1e4
    elif kind == "zeros":
        W[rng.random(W.shape) < 0.6] = 0
        W[0] = 0
    elif kind == "tiny":
        W *= 1e-7
    elif kind == "one value":
        W[:] = 0
        W[:, rng.integers(cols)] = rng.normal()
    return W


def problem(rows, cols, hessian="correlated", weight="normal", seed=0):
    """A problem that is the same on every machine for the same arguments."""
    rng = np.random.default_rng(seed)
    W, X = weights(weight, rows, cols, rng), inputs(hessian, cols, rng)
    H = X.T @ X / len(X)
    if hessian == "diagonal":
        H = np.diag(np.diag(H))
    name = f"problem({rows}, {cols}, {hessian!r}, {weight!r}, {seed})"
    # float32 keeps both exactly, so that the same problem can be solved in either precision.
    H = np.triu(H) + np.triu(H, 1).T
    return Problem(W.astype(np.float32).astype(float), H.astype(np.float32).astype(float), name)


@st.composite
def problems(draw, hessians=HESSIANS, weights=WEIGHTS, max_rows=4, max_cols=20):
    """Any problem of these kinds."""
    return problem(
        draw(st.integers(1, max_rows)),
        draw(st.integers(1, max_cols)),
        draw(st.sampled_from(hessians)),
        draw(st.sampled_from(weights)),
        draw(st.integers(0, 10**6)),
    )


def grid_options(groupsizes=(-1, 1, 3, 8, 64), mse=(False, True)):
    """The options of a grid: bits, group sizes that divide the columns and that do not, both
    kinds of zero point."""
    return st.fixed_dictionaries(
        {
            "wbits": st.sampled_from((2, 3, 4, 8)),
            "groupsize": st.sampled_from(groupsizes),
            "sym": st.booleans(),
            "mse": st.sampled_from(mse),
        }
    )
