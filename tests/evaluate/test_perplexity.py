"""Perplexity against a loop in float64 over one token at a time."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zoo
import zoo_configs

from optq.errors import DataError, NumericsError
from optq.evaluate import perplexity as room
from optq.evaluate.perplexity import perplexity


@pytest.fixture(scope="module")
def llama():
    return next(row for row in zoo.ROWS if row.name == "llama").build()


def by_hand(model, windows):
    """exp of the mean of -log p(token | the tokens before it in its window)."""
    total, tokens = 0.0, 0
    for window in windows:
        for end in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :end]).logits[0, -1].double()
            weights = [math.exp(x) for x in logits.tolist()]
            total -= math.log(weights[window[end]] / sum(weights))
            tokens += 1
    return math.exp(total / tokens), tokens


def test_against_a_plain_loop(llama):
    windows = zoo.token_ids(3, 8)
    expected, tokens = by_hand(llama, windows)
    result = perplexity(llama, windows)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.nll == pytest.approx(math.log(expected), rel=1e-5)
    assert (result.tokens, result.windows) == (tokens, 3) == (21, 3)


@pytest.fixture(params=[1, 2])
def threads(request):
    """How many there are, of torch's, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch_tokens, positions", [(1, 1), (47, 7), (48, 23), (1000, 22)])
def test_batches_and_chunks_change_nothing(llama, monkeypatch, batch_tokens, positions, threads):
    windows = zoo.token_ids(5, 24)
    whole = perplexity(llama, windows)
    monkeypatch.setattr(room, "POSITIONS", positions)
    sizes = []
    hook = llama.register_forward_pre_hook(
        lambda *call: sizes.append(len(call[2]["input_ids"])), with_kwargs=True
    )
    try:
        pieces = perplexity(llama, windows, batch_tokens=batch_tokens)
    finally:
        hook.remove()
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    batch = max(1, batch_tokens // 24)  # in so many parts at once, one window at least
    assert sum(sizes) == 5 and max(sizes) == min(5, batch // min(threads, batch))
    assert torch.get_num_threads() == threads


def test_a_bfloat16_model_stays_so_and_its_loss_does_not():
    model = next(row for row in zoo.ROWS if row.name == "llama_bfloat16").build()
    windows = zoo.token_ids(2, 16)
    with torch.no_grad():
        logits = model(input_ids=windows).logits
    assert logits.dtype == torch.bfloat16
    chosen = logits[:, :-1].double().log_softmax(-1).gather(-1, windows[:, 1:, None])
    assert perplexity(model, windows).nll == pytest.approx(-chosen.mean().item(), rel=1e-6)


def test_equal_logits_give_the_size_of_the_vocabulary(llama):
    model = type(llama)(llama.config)
    model.lm_head.weight.data.zero_()
    assert perplexity(model, zoo.token_ids()).perplexity == pytest.approx(zoo_configs.VOCAB)


def test_integers_of_any_width(llama):
    windows = zoo.token_ids()
    assert perplexity(llama, windows.to(torch.int32)) == perplexity(llama, windows)


def test_modes_and_gradients_are_left_as_found(llama):
    model = type(llama)(llama.config)
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    hook = model.register_forward_hook(
        lambda module, _, output: seen.append((module.training, output.logits.requires_grad))
    )
    perplexity(model, zoo.token_ids())
    hook.remove()
    assert seen == [(False, False)]
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


def test_progress_counts_windows(llama, threads):
    calls = []
    perplexity(
        llama,
        zoo.token_ids(5, 24),
        batch_tokens=48,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 5) for done in ((2, 4, 5) if threads == 1 else range(1, 6))]


def test_threads_that_are_yet_to_come_have_all_cores(llama, threads):
    perplexity(llama, zoo.token_ids(5, 24))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(llama, value, threads):
    windows = zoo.token_ids(4, 24)
    windows[windows == 50] = 51
    windows[2, 10] = 50  # only the third window reads the poisoned row
    model = type(llama)(llama.config)
    model.load_state_dict(llama.state_dict())
    model.model.embed_tokens.weight.data[50] = value
    model.train()
    with pytest.raises(NumericsError, match="not finite in window 2"):
        perplexity(model, windows)
    assert model.training and torch.get_num_threads() == threads


def test_a_perplexity_beyond_floating_point(llama):
    """Every logit is finite, and e to the mean loss is not."""
    model = type(llama)(llama.config)
    model.load_state_dict(llama.state_dict())
    model.lm_head.weight.data *= 1e5
    with pytest.raises(NumericsError, match="beyond floating point"):
        perplexity(model, zoo.token_ids())


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (3, 0)])
def test_nothing_to_predict(llama, shape):
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(llama, torch.zeros(shape, dtype=torch.int64))
