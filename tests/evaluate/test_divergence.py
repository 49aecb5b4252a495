"""Divergence, agreement and ratio against plain float64 arithmetic on whole logits."""

import math
import statistics

import numpy as np
import pytest
import torch
import zoo

from optq import ModelConfig
from optq.data.evaluation import evaluation_tokens
from optq.errors import DataError, NumericsError
from optq.evaluate import divergence as room
from optq.evaluate.divergence import divergence, standard_error
from optq.evaluate.perplexity import perplexity
from optq.model.predictions import predictions


def row(name):
    return next(each for each in zoo.ROWS if each.name == name)


def moved(model, by=0.02):
    """Another model near it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.mul_(1 + by * noise.to(parameter.dtype))
    return model


def by_hand(model, dense, windows, common=None):
    """All of it in numpy's float64, from the logits of all windows at once.

    (In bfloat16 the logits of a window are others where it comes alone.)
    """
    kl, same, losses = [], [], []
    with torch.no_grad():
        every = [each(input_ids=windows).logits[:, :-1].double().numpy() for each in (model, dense)]
    for window, q, p in zip(windows, *every, strict=True):
        pair = []
        for z in (q, p):
            z -= np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) + z.max(
                1, keepdims=True
            )
            pair.append([-z[i, int(t)] for i, t in enumerate(window[1:])])
        q, p = q[:, :common], p[:, :common]
        if common is not None:
            q, p = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (q, p))
        kl.append((np.exp(p) * (p - q)).sum(1))
        same.append(q.argmax(1) == p.argmax(1))
        losses.append(pair)
    own, full = ([np.mean(pair[i]) for pair in losses] for i in (0, 1))
    apart = [a - b for a, b in zip(own, full, strict=True)]
    ratio = math.exp(np.mean(apart))
    return {
        "mean": np.mean(kl),
        "mean_error": statistics.stdev(np.mean(each) for each in kl) / len(kl) ** 0.5,
        "percentile": np.quantile(np.concatenate(kl), 0.999, method="inverted_cdf"),
        "agreement": np.mean(same),
        "agreement_error": statistics.stdev(np.mean(each) for each in same) / len(kl) ** 0.5,
        "ratio": ratio,
        "ratio_error": ratio * statistics.stdev(apart) / len(apart) ** 0.5,
    }


def holds(found, wanted, rel):
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=rel), name


def test_of_the_bundled_model_against_a_plain_computation():
    """A four-bit model's, to 1e-4 of each number."""
    from optq import GPTQ, Runner

    config = ModelConfig("demo", "cpu")
    dense, tokenizer = config.load()
    windows = evaluation_tokens("demo", tokenizer, 256)[:6]
    runner = Runner(config, GPTQ(4, 128, polish=0), calib="demo", nsamples=4, seqlen=128)
    model = runner.run().model
    wanted = by_hand(model, dense, windows)
    assert 1e-3 < wanted["mean"] < 0.2 and 0.5 < wanted["agreement"] < 1
    found = divergence(model, predictions(dense, [windows])[0], windows)
    holds(found, wanted, 1e-4)
    assert found.own == perplexity(model, windows)
    assert found.dense == perplexity(config.load()[0], windows)


@pytest.mark.parametrize("batch_tokens, numbers", [(1, 1), (47, 500), (4096, 2**18)])
def test_batches_and_chunks_change_nothing(monkeypatch, batch_tokens, numbers):
    monkeypatch.setitem(room.AT_ONCE, "cpu", numbers)
    model, windows = moved(row("llama").build()), zoo.token_ids(5, 24)
    wanted = by_hand(model, row("llama").build(), windows)
    kept = predictions(row("llama").build(), [windows])[0]
    seen = []
    found = divergence(model, kept, windows, batch_tokens, lambda *done: seen.append(done))
    holds(found, wanted, 1e-4)
    assert seen[-1] == (5, 5) and len(seen) == -(-5 // max(1, batch_tokens // 24))


def test_vocabularies_that_are_padded_to_different_sizes():
    dense, model = row("llama").build(), moved(row("llama").build())
    size = dense.config.vocab_size
    model.resize_token_embeddings(size + 16, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[size:] = model.lm_head.weight[:16]
    windows = zoo.token_ids(4, 24)
    wanted = by_hand(model, dense, windows, common=size)
    holds(divergence(model, predictions(dense, [windows])[0], windows), wanted, 1e-4)
    wanted = by_hand(dense := row("llama").build(), model, windows, common=size)
    holds(divergence(dense, predictions(model, [windows])[0], windows), wanted, 1e-4)


def test_of_a_model_and_itself():
    model, windows = row("llama").build(), zoo.token_ids(3, 24)
    found = divergence(model, predictions(row("llama").build(), [windows])[0], windows)
    assert (found.agreement, found.ratio, found.ratio_error) == (1, 1, 0)
    assert found.mean == found.percentile == 0


def test_one_window_has_no_spread():
    model, windows = moved(row("llama").build()), zoo.token_ids(1, 24)
    found = divergence(model, predictions(row("llama").build(), [windows])[0], windows)
    assert found.mean > 0 and found.ratio != 1
    assert found.mean_error is found.agreement_error is found.ratio_error is None


def test_the_standard_error_is_that_of_the_mean():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0]).double()
    assert standard_error(values) == pytest.approx(statistics.stdev([1, 2, 4, 9]) / 2)


def test_paired_windows_tell_a_small_difference():
    """The windows differ far more from each other than the models do on any of them."""
    model, windows = moved(row("llama").build(), 1e-3), zoo.token_ids(8, 24)
    found = divergence(model, predictions(row("llama").build(), [windows])[0], windows)
    alone = standard_error(torch.tensor(found.own.losses).double())
    assert 0 < found.ratio_error < alone / 20


@pytest.mark.parametrize("whose", ["model", "dense model"])
def test_logits_that_are_not_finite(whose):
    windows = zoo.token_ids(4, 24)
    windows[windows == 50] = 51
    windows[2, 10] = 50  # only the third window reads the poisoned row
    model, dense = row("llama").build(), row("llama").build()
    broken = model if whose == "model" else dense
    broken.model.embed_tokens.weight.data[50] = math.nan
    kept = predictions(dense, [windows])[0]
    with pytest.raises(NumericsError, match=f"the {whose}'s logits are not finite in window 2"):
        divergence(model, kept, windows)


def biased(value):
    """A model whose logits of token 60 are ``value``."""
    model = row("llama").build()

    def put(module, args, output):
        output = output.clone()
        output[..., 60] = value
        return output

    model.lm_head.register_forward_hook(put)
    return model


def test_what_is_ruled_out():
    """Counts for nothing where the dense model does so, and has no bound where the model does."""
    windows = zoo.token_ids(2, 24)
    windows[windows == 60] = 61
    never = predictions(biased(-math.inf), [windows])[0]
    found = divergence(row("llama").build(), never, windows)
    assert 0 < found.mean < math.inf
    both = divergence(biased(-math.inf), never, windows)
    assert both.mean == 0 and both.agreement == 1
    kept = predictions(row("llama").build(), [windows])[0]
    with pytest.raises(NumericsError, match="the divergence is infinite in window 0"):
        divergence(biased(-math.inf), kept, windows)


def test_nothing_to_predict():
    model = row("llama").build()
    kept = predictions(row("llama").build(), [zoo.token_ids(2, 8)])[0]
    for shape in ((0, 8), (3, 1)):
        with pytest.raises(DataError, match="nothing to predict"):
            divergence(model, kept, torch.zeros(shape, dtype=torch.int64))
