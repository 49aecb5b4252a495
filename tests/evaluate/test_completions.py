"""Greedy continuations, token by token, and what is wrong with them."""

import pytest
import torch
import zoo

from optq import ModelConfig
from optq.evaluate import completions as room
from optq.evaluate.completions import Continued, beside, continued, fault, first_difference, texts


def test_they_are_the_greedy_ones():
    """Against a loop that takes the likeliest token, one forward each."""
    model, tokenizer = ModelConfig("demo", "cpu").load()
    prompt = "def fibonacci(n):"
    (found,) = continued(model, tokenizer, [prompt])
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(room.NEW_TOKENS):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    wanted = ids[0, start:].tolist()
    same = first_difference(found.ids, wanted)
    assert same is None or same > 8  # a cache changes bits of bfloat16
    assert len(found.tokens) == len(found.ids) == room.NEW_TOKENS
    whole = tokenizer.decode(ids[0, :start].tolist() + found.ids)
    assert prompt + "".join(found.tokens) == whole


def test_a_prompt_that_fills_the_positions_is_left_out():
    model = next(row for row in zoo.ROWS if row.name == "llama").build()
    found = continued(model, zoo.tokenizer(), ["the end", "x" * 64])
    assert [each.prompt for each in found] == ["the end"]


@pytest.mark.parametrize(
    ("ids", "text", "expected"),
    [
        (range(32), "all is well", None),
        ([*range(20), *[7] * 12], "", "repeats itself"),
        ([*range(21), *[7] * 11], "", None),
        ([*range(20), *[1, 2, 3, 4] * 3], "", "repeats itself"),
        ([*range(24), *[1, 2, 3, 4] * 2], "", None),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 3, "", "repeats itself"),
        ([*[7] * 20, 1, 2], "", None),  # it has come out of it
        ([1] * 11, "", None),
        ([], "", None),
        (range(9), "caf\ufffd au lait", "has invalid bytes"),
        (range(9), "an emoji that is cut \ufffd", None),
    ],
)
def test_faults(ids, text, expected):
    assert fault(list(ids), text) == expected


def test_a_character_of_several_tokens_is_the_last_ones():
    _, tokenizer = ModelConfig("demo", "cpu").load()
    start = tokenizer("x =")["input_ids"]
    for text in (" 'naïve — 日本'", " '\U0001f40d'"):
        ids = tokenizer(text)["input_ids"]
        pieces = texts(tokenizer, start, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
        assert "" in pieces and not any(room.REPLACED in piece for piece in pieces)
    cut = tokenizer("\U0001f40d")["input_ids"][:-1]
    assert texts(tokenizer, start, cut)[-1] == room.REPLACED


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([], [], None),
    ],
)
def test_the_first_difference(one, other, expected):
    assert first_difference(one, other) == first_difference(other, one) == expected


def test_beside_a_dense_model():
    own = [Continued("a", [1, 2], ["x", "y"], "repeats itself"), Continued("b", [1], ["x"], None)]
    dense = [Continued("a", [1, 3], ["x", "z"], "repeats itself")]
    one, other = beside(own, dense)
    assert (one.differs, one.dense) == (1, ["x", "z"])
    assert one.fault == "repeats itself, as the dense model does"
    assert other.dense is other.differs is other.fault is None
    assert [each.dense for each in beside(own, None)] == [None, None]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_cut_at_the_end_has_no_invalid_bytes(cut):
    """Tokenizers that fall back to bytes write one sign for each byte that is left over."""
    assert fault([1, 2, 3], "a" + "\ufffd" * cut) is None
    assert fault([1, 2, 3], "a" + "\ufffd" * 4) == "has invalid bytes"
    assert fault([1, 2, 3], "\ufffd" * cut + "a") == "has invalid bytes"
