"""Decoding with a static cache: the tokens of transformers' own greedy generation."""

from dataclasses import replace

import pytest
import torch
import zoo
import zoo_configs as configs
from transformers import Qwen3Config

from optq.evaluate.graph import GraphDecoder, capturable

ROWS = {row.name: row for row in zoo.ROWS}
FULL = {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST, NEW = 40, 12


def decode(decoder, ids, new_tokens):
    """The greedy continuation ``[new_tokens]`` of ``ids [1, n]``; no token stops it."""
    logits = decoder.prefill(ids)
    tokens = [logits.argmax().view(1)]
    for _ in range(new_tokens - 1):
        tokens.append(decoder.step(tokens[-1]).argmax().view(1))
    return torch.cat(tokens)


def build(name):
    """A model of the zoo; Qwen3 as it is published, without the zoo's sliding window."""
    row = ROWS[name]
    if name == "qwen3":
        row = replace(row, config=lambda: Qwen3Config(**{**configs.qwen3().to_dict(), **FULL}))
    return row.build().to(DEVICE)


def generated(model, ids, count):
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_greedy_tokens_are_those_of_generate(name):
    model = build(name)
    assert capturable(model)
    model.generation_config.eos_token_id = None
    decoder = GraphDecoder(model, LONGEST)
    for seed, length in enumerate([5, 9, 3]):  # one decoder, several sequences
        ids = zoo.token_ids(1, length, seed).to(DEVICE)
        assert decode(decoder, ids, NEW).tolist() == generated(model, ids, NEW).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_logits_are_those_of_the_whole_sequence(name):
    model = build(name)
    ids = zoo.token_ids(1, 10).to(DEVICE)
    decoder = GraphDecoder(model, 10)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0]
    torch.testing.assert_close(decoder.prefill(ids[:, :4]), expected[3], rtol=1e-4, atol=1e-4)
    for index in range(4, 10):
        step = decoder.step(int(ids[0, index]))
        torch.testing.assert_close(step, expected[index], rtol=1e-4, atol=1e-4)


def test_a_full_sequence_is_an_error():
    model = build("llama")
    decoder = GraphDecoder(model, 4)
    with pytest.raises(ValueError, match="no room"):
        decoder.prefill(zoo.token_ids(1, 4).to(DEVICE))
    decoder.prefill(zoo.token_ids(1, 3).to(DEVICE))
    decoder.step(7)
    with pytest.raises(ValueError, match="full"):
        decoder.step(7)


def test_a_rotary_table_that_depends_on_the_length_is_left_to_generate():
    config = configs.llama()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not capturable(replace(ROWS["llama"], config=lambda: config).build())


@pytest.mark.parametrize("name", ["gemma2", "mistral", "falcon", "mpt"])
def test_windows_and_numbers_that_are_read_back_are_left_to_generate(name):
    assert not capturable(ROWS[name].build())
