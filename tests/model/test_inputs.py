"""The sums of a site against plain loops over tokens in float64."""

import pytest
import torch

from optq.errors import NumericsError
from optq.model.inputs import Handed, gather

CPU = torch.device("cpu")
COLUMNS = 5
IDS = torch.zeros(2, 4, dtype=torch.long)  # two samples of four tokens a batch


def stream(batches):
    """Batches of rows by token: ``[(tokens or None, {token: row})]`` as they are handed over."""
    return [
        Handed(2 * number, IDS, torch.stack([rows[t] for t in rows]), tokens)
        for number, (tokens, rows) in enumerate(batches)
    ]


def rows_of(tokens):
    return {token: torch.randn(COLUMNS, dtype=torch.float64) for token in tokens}


def named(tokens):
    return torch.tensor(tokens), rows_of(tokens)


def whole():
    return None, rows_of(range(8))


def unnamed(tokens):
    return None, rows_of(tokens)


def loop(quantized, full):
    """Sums over tokens that both streams hold, over all tokens of the quantized one."""
    H, drift = torch.zeros(2, COLUMNS, COLUMNS, dtype=torch.float64)
    count = 0
    for (names, rows), (other_names, others) in zip(quantized, full, strict=True):
        known = all(n is not None or len(r) == 8 for n, r in [(names, rows), (other_names, others)])
        for token, x in rows.items():
            H += torch.outer(x, x)
            count += 1
            if known and token in others:
                drift += torch.outer(others[token] - x, x)
    return H / count, drift / count, count


@pytest.mark.parametrize(
    "mine, theirs",
    [
        (whole, whole),
        (lambda: named([0, 3, 6]), lambda: named([1, 3, 4])),  # as many, but others
        (lambda: named([5, 0, 2]), lambda: named([2, 7, 5, 1])),  # in another order
        (lambda: named([1, 2]), lambda: named([3, 4])),  # none in common
        (lambda: named([4, 6]), whole),
        (whole, lambda: named([7, 1])),
        (lambda: unnamed([0, 3, 6]), lambda: unnamed([1, 3, 4])),
        (lambda: unnamed([0, 3]), whole),
        (lambda: named([0]), lambda: named([0])),
    ],
)
def test_drift_is_of_the_tokens_that_both_streams_hold(mine, theirs):
    quantized, full = [mine(), whole()], [theirs(), whole()]
    sums = gather("a", COLUMNS, CPU, torch.float64, stream(quantized), stream(full))
    H, drift, count = loop(quantized, full)
    assert sums.tokens == count
    torch.testing.assert_close(sums.H, H, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.drift, drift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_routed_batches_count_alike_however_many_are_multiplied_at_once(monkeypatch, at_once):
    monkeypatch.setattr("optq.model.inputs.TOKENS", at_once)
    quantized = [named([0, 3, 6]), named([1, 2]), whole(), named([5]), named([7, 4, 0])]
    full = [named([3, 0]), named([4]), whole(), named([5, 1]), named([0, 4, 7])]
    sums = gather("a", COLUMNS, CPU, torch.float64, stream(quantized), stream(full))
    H, drift, count = loop(quantized, full)
    assert sums.tokens == count
    torch.testing.assert_close(sums.H, H, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.drift, drift, rtol=1e-12, atol=1e-12)


def test_the_correction_is_the_least_squares_fit_to_the_outputs_the_layer_should_give():
    """A token that the full-precision stream lacks is to stay what the layer makes of it."""
    from optq.core.problem import Problem
    from optq.core.qep import QEP

    tokens = list(range(8))
    quantized, full = [named(tokens), named(tokens)], [named(tokens[:5]), named([6, 2])]
    sums = gather("a", COLUMNS, CPU, torch.float64, stream(quantized), stream(full))
    weight = torch.randn(3, COLUMNS, dtype=torch.float64)
    corrected = QEP(alpha=1.0, percdamp=0.0).correct(Problem(sums.H), weight, sums.drift)
    X = torch.stack([x for _, rows in quantized for x in rows.values()])
    Y = torch.stack(
        [
            others.get(token, rows[token])
            for (_, rows), (_, others) in zip(quantized, full, strict=True)
            for token in rows
        ]
    )
    fit = torch.linalg.lstsq(X, Y @ weight.T).solution.T
    torch.testing.assert_close(corrected, fit, rtol=1e-8, atol=1e-8)


def test_shapes_in_which_a_batch_comes_whole():
    x, y = torch.randn(2, 2, 4, COLUMNS, dtype=torch.float64)
    flat = gather(
        "a",
        COLUMNS,
        CPU,
        torch.float64,
        [Handed(0, IDS, x.flatten(0, 1))],
        [Handed(0, IDS, y.flatten(0, 1))],
    )
    both = gather("a", COLUMNS, CPU, torch.float64, [Handed(0, IDS, x)], [Handed(0, IDS, y)])
    assert torch.equal(flat.drift, both.drift) and both.drift.any()


@pytest.mark.parametrize("tokens, sample", [([1, 5, 6], 3), ([6, 2, 1], 2), (None, None)])
def test_nan_in_a_routed_token_is_named(tokens, sample):
    x = torch.randn(3, COLUMNS)
    x[1:] = float("nan")
    handed = Handed(2, IDS, x, None if tokens is None else torch.tensor(tokens))
    which = "samples 2 to 3" if sample is None else f"sample {sample}"
    with pytest.raises(NumericsError, match=f"the input of a holds NaN.* calibration {which}"):
        gather("a", COLUMNS, CPU, torch.float64, [handed], None)
