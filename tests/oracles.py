"""The algebra of the solvers a second time: float64, plain loops, obviously right, slow.

Written from the definitions and from the papers, never from ``optq.core``, so that the two can
disagree. Arrays are NumPy float64: ``W [rows, cols]`` a weight, ``H [cols, cols]`` a Hessian that
is not damped unless the argument is called ``damped``, ``g_idx [cols]`` the group of each column,
``scales`` and ``zeros`` ``[rows, groups]``, codes integers in ``0..2^bits - 1``.

Ties. A symmetric grid puts the largest weight of a group exactly half way between two codes, so
the last bit of a division decides which one rounding takes, and both are right. Every function
that rounds takes ``follow``: codes from elsewhere that it adopts at a tie, and only there.
"""

from dataclasses import dataclass

import numpy as np

TIE = 1e-9  # how near to half way between two codes, in steps, counts as a tie


# ---------------------------------------------------------------------------------------- grids


def fit(values, bits, sym, min_zero=0, below=1.0, above=1.0):
    """The grid ``(scale, zero)`` of one group for the ends ``below * min`` and ``above * max``.

    Symmetric: for ``below`` times the larger of the two, with the sign of ``below``.
    """
    top = 2**bits - 1
    low, high = min(0.0, float(min(values))), max(0.0, float(max(values)))
    if low == high:  # nothing but zeros: any zero point would do
        return 1.0, 2 ** (bits - 1)
    if sym:
        return 2 * max(-low, high) * below / top, 2 ** (bits - 1)
    low, high = low * below, high * above
    scale = (high - low) / top
    zero = round(-low / scale)
    if zero < min_zero:
        return high / (top - min_zero), min_zero
    return scale, min(zero, top)


def is_tie(value, scale, zero, bits):
    """Whether ``value`` lies half way between two codes that both exist."""
    position = value / scale + zero
    below = int(np.floor(position))
    return abs(position - below - 0.5) < TIE and 0 <= below < 2**bits - 1


def code_of(value, scale, zero, bits, follow=None):
    """The code nearest to ``value`` on the grid; ``follow`` where two codes are equally near."""
    position = value / scale + zero
    below = int(np.floor(position))
    if follow in (below, below + 1) and is_tie(value, scale, zero, bits):
        return int(follow)
    nearest = below if position - below <= 0.5 else below + 1
    return min(max(nearest, 0), 2**bits - 1)


def fit_loss(values, scale, zero, bits, importance=None):
    """What the range search minimises: ``sum h (w - q)^2`` over the group."""
    h = np.ones(len(values)) if importance is None else importance
    return sum(
        float(h[k]) * (float(w) - scale * (code_of(w, scale, zero, bits) - zero)) ** 2
        for k, w in enumerate(values)
    )


def fit_search(values, bits, sym, min_zero=0, importance=None, near=None):
    """The range search: ``(scale, zero, clear)``, ``clear`` where no two losses were too close.

    Factors 1, 0.78, 0.56, 0.34 of the min-max range, or (but not at 2 bits) 1 and those of the grid
    ``near``; symmetric ones of either sign, earlier ones first unless a later one is better by
    1e-5; then each end of the best moves by 0.08 and 0.04.
    """
    clear, best = True, None
    noise = 1e-25 * fit_loss(values, 1e300, 0, bits, importance)  # of nothing but zeros

    def consider(below, above):
        nonlocal clear, best
        scale, zero = fit(values, bits, sym, min_zero, below, above)
        loss = fit_loss(values, scale, zero, bits, importance)
        if best is None:
            best = (loss, scale, zero, below, above)
            return
        limit = best[0] * (1 - 1e-5)
        if (scale, zero) != best[1:3] and any(values):
            clear = clear and abs(loss - limit) > 1e-9 * limit and max(loss, limit) > noise
        if loss < limit:
            best = (loss, scale, zero, below, above)

    factors = [(1.0, 1.0), (0.78, 0.78), (0.56, 0.56), (0.34, 0.34)]
    if near is not None and bits > 2:
        top, low, high = 2**bits - 1, min(0.0, *values), max(0.0, *values)
        if sym:
            largest = max(-low, high)
            factor = abs(near[0]) * top / (2 * largest) if largest else 1.0
            factors[1:] = [(factor, factor)]
        else:
            below = -near[1] * near[0] / low if low else 1.0
            factors[1:] = [(below, (top - near[1]) * near[0] / high if high else 1.0)]
    for below, above in factors:
        consider(below, above)
        if sym:
            consider(-below, above)
    for step in (0.08, 0.04):
        for end in ("below",) if sym else ("below", "above"):
            _, _, _, below, above = best
            for move in (step, -step):
                if end == "below":
                    consider(below + move, above)
                else:
                    consider(below, above + move)
    return best[1], best[2], clear


def group_index(cols, groupsize):
    """``[cols]``: the group of each column, ``groupsize`` consecutive columns to a group."""
    return np.array([0 if groupsize == -1 else j // groupsize for j in range(cols)])


def fit_all(W, bits, g_idx, sym, importance=None, min_zero=0):
    """Scales and zero points of every group of every row, and the rows where they are clear.

    Min-max; with the ``importance`` of each column, the range search.
    """
    groups = max(g_idx) + 1
    scales, zeros = np.empty((len(W), groups)), np.empty((len(W), groups), dtype=int)
    clear = np.ones(len(W), dtype=bool)
    for n, row in enumerate(W):
        for g in range(groups):
            members = [k for k in range(len(row)) if g_idx[k] == g]
            if importance is None:
                scales[n, g], zeros[n, g] = fit(row[members], bits, sym, min_zero)
            else:
                h = importance[members]
                scales[n, g], zeros[n, g], sure = fit_search(row[members], bits, sym, min_zero, h)
                clear[n] &= sure
    return scales, zeros, clear


def dequantize(codes, scales, zeros, g_idx):
    """``[rows, cols]``: ``s * (c - z)`` of every code."""
    Q = np.empty(codes.shape)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = g_idx[k]
            Q[n, k] = float(scales[n, g]) * (int(codes[n, k]) - int(zeros[n, g]))
    return Q


def round_to_nearest(W, bits, scales, zeros, g_idx):
    """Codes ``[rows, cols]`` of round-to-nearest on given grids, ties to the even step."""
    codes = np.empty(W.shape, dtype=int)
    for n in range(W.shape[0]):
        for k in range(W.shape[1]):
            s, z = scales[n, g_idx[k]], zeros[n, g_idx[k]]
            codes[n, k] = code_of(W[n, k], s, z, bits, follow=round(W[n, k] / s) + z)
    return codes


# --------------------------------------------------------------------------- error and Hessian


def row_errors(W, Q, H):
    """``[rows]``: the summands of ``tr((W - Q) H (W - Q)^T)``."""
    return np.array([(w - q) @ H @ (w - q) for w, q in zip(W, Q, strict=True)])


def hessian(X):
    """``X^T X / tokens`` of inputs ``[tokens, cols]``, one token at a time."""
    H = np.zeros((X.shape[1], X.shape[1]))
    for x in X:
        H += np.outer(x, x)
    return H / len(X)


def damping(H, percdamp):
    """``d = percdamp * mean(diag H)``."""
    return percdamp * float(np.mean(np.diag(H)))


# ------------------------------------------------------------------------------- OBS and OBQ


def constrained_move(damped, p, change):
    """The least ``dw^T H dw / 2`` with ``dw_p = change``: ``(dw, that minimum)``.

    Solves the Lagrange conditions ``H dw + m e_p = 0``, ``e_p dw = change`` as one dense system.
    """
    n = len(damped)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = damped
    system[n, p] = system[p, n] = 1.0
    right = np.zeros(n + 1)
    right[n] = change
    dw = np.linalg.solve(system, right)[:n]
    return dw, float(dw @ damped @ dw) / 2


def obs_remove(w, damped, p):
    """Weight ``p`` set to zero, the others moved as best they can: ``(new w, cost)``."""
    dw, cost = constrained_move(damped, p, -w[p])
    return w + dw, cost


def obq_row(w, damped, bits, scales, zeros, g_idx, follow=None):
    """Greedy OBQ of one row on fixed grids: ``(codes, order, costs)``.

    Every step tries every weight that is left with a dense constrained solve, and takes the one
    that costs least.
    """
    w = np.array(w, dtype=float)
    left = list(range(len(w)))
    codes, order, costs = np.empty(len(w), dtype=int), [], []
    while left:
        block = damped[np.ix_(left, left)]
        best = None
        for position, p in enumerate(left):
            g = g_idx[p]
            code = code_of(w[p], scales[g], zeros[g], bits, None if follow is None else follow[p])
            target = scales[g] * (code - zeros[g])
            dw, cost = constrained_move(block, position, target - w[p])
            if best is None or cost < best[0]:
                best = (cost, p, code, dw)
        cost, p, codes[p], dw = best
        w[left] += dw
        left.remove(p)
        order.append(p)
        costs.append(cost)
    return codes, order, costs


# ------------------------------------------------------------------------------------- GPTQ


@dataclass
class Sweep:
    """What a sweep leaves behind, columns in their original order."""

    codes: np.ndarray  # [rows, cols]
    scales: np.ndarray  # [rows, groups]
    zeros: np.ndarray  # [rows, groups]
    g_idx: np.ndarray  # [cols]
    reached: np.ndarray  # [rows, cols]: each weight as it stood when its column was reached
    order: np.ndarray  # [cols]: the columns in the order in which they were quantized
    tied: np.ndarray  # [rows]: whether a weight of the row was half way between two codes
    clear: np.ndarray  # [rows]: whether every range search had one best grid

    @property
    def weight(self):
        return dequantize(self.codes, self.scales, self.zeros, self.g_idx)


def act_order(H):
    """Columns by falling ``diag H``, equal ones in their own order."""
    return np.array(sorted(range(len(H)), key=lambda j: -H[j, j]))


def group_order(H, size):
    """Groups of ``size`` columns by falling largest ``diag H``, but a shorter last one last; each
    one's columns by falling ``diag H``."""
    groups = [list(range(start, min(start + size, len(H)))) for start in range(0, len(H), size)]
    for group in groups:
        group.sort(key=lambda j: -H[j, j])
    groups.sort(key=lambda group: (len(group) < size, -H[group[0], group[0]]))
    return np.array([j for group in groups for j in group])


def gptq(
    W,
    H,
    d,
    bits,
    groupsize=-1,
    sym=True,
    actorder=False,
    static_groups=False,
    search=False,
    min_zero=0,
    follow=None,
):
    """GPTQ in the paper's form: ``R = cholesky(H^-1, upper)``, one column after another, no blocks.

    ``d`` is the damping that is added. Dynamic groups follow the order of quantization and fit
    their grid on the weights as updated so far; static groups are the original columns' groups,
    fitted on the original weights. ``search``: by range search, with ``diag H`` as importance; for
    dynamic groups from the original weights' grids.
    """
    rows, cols = W.shape
    size = cols if groupsize == -1 else groupsize
    order = np.arange(cols)
    if actorder:
        order = group_order(H, size) if actorder == "group" else act_order(H)
    damped = (H + d * np.eye(cols))[np.ix_(order, order)]
    R = np.linalg.cholesky(np.linalg.inv(damped)).T

    clear = np.ones(rows, dtype=bool)
    importance = np.diag(H) if search else None
    if static_groups:
        g_idx = group_index(cols, groupsize)
        scales, zeros, clear = fit_all(W, bits, g_idx, sym, importance, min_zero)
    else:
        g_idx = np.empty(cols, dtype=int)
        for rank, column in enumerate(order):
            g_idx[column] = (column if actorder == "group" else rank) // size
        scales = np.full((rows, max(g_idx) + 1), np.nan)
        zeros = np.zeros((rows, max(g_idx) + 1), dtype=int)
        if search:
            *near, clear = fit_all(W, bits, g_idx, sym, importance, min_zero)

    work = np.array(W[:, order], dtype=float)
    codes, reached = np.empty(W.shape, dtype=int), np.empty(W.shape)
    tied = np.zeros(rows, dtype=bool)
    for rank, column in enumerate(order):
        g = g_idx[column]
        for n in range(rows):
            if not static_groups and rank % size == 0:
                values = work[n, rank : rank + size]
                if search:
                    h = importance[order[rank : rank + size]]
                    start = (near[0][n, g], near[1][n, g])
                    # One group to a row: no weight is updated before its grid is fitted.
                    start = start if size < cols else None
                    found = fit_search(values, bits, sym, min_zero, h, start)
                    scales[n, g], zeros[n, g] = found[:2]
                    clear[n] &= found[2]
                else:
                    scales[n, g], zeros[n, g] = fit(values, bits, sym, min_zero)
            w = work[n, rank]
            prefer = None if follow is None else follow[n, column]
            code = code_of(w, scales[n, g], zeros[n, g], bits, prefer)
            tied[n] |= is_tie(w, scales[n, g], zeros[n, g], bits)
            e = (w - scales[n, g] * (code - zeros[n, g])) / R[rank, rank]
            work[n, rank:] -= e * R[rank, rank:]
            codes[n, column], reached[n, column] = code, w
    return Sweep(codes, scales, zeros, g_idx, reached, order, tied, clear)


def without_dead(W, H):
    """``W`` with weight zero at every input that is always zero."""
    return np.where(np.diag(H) == 0, 0.0, W)


def never_worse(W, H, sweep, rounded, codes):
    """What is left of a sweep where a row that lost to rounding takes the rounded codes.

    ``sweep`` and ``rounded`` are weights and ``codes`` theirs ``(sweep's, rounded's)``. Returns
    the codes and, row by row, whether they are sure: whether the two errors are not too close to
    call.
    """
    ours, theirs = row_errors(W, sweep, H), row_errors(W, rounded, H)
    better = np.where((ours <= theirs)[:, None], codes[0], codes[1])
    return better, (sweep == rounded).all(1) | (np.abs(ours - theirs) > 1e-9 * theirs)
