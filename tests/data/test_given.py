"""Calibration as Python objects: texts, records, and what tokenizers give."""

import json

import datasets
import numpy as np
import pytest
import torch
import zoo

from optq.data.calibration import calibration_tokens
from optq.data.given import given
from optq.data.text import Text
from optq.errors import DataError

TEXTS = [f"the other end of the {index}th theorem" for index in range(20)]
ROWS = datasets.Dataset.from_dict({"text": TEXTS})
IDS = torch.arange(24).reshape(3, 8)


def windows(calib, chat=False):
    return calibration_tokens(given(calib, chat), zoo.tokenizer(), 8, 16, seed=3)


@pytest.mark.parametrize(
    "calib",
    [
        TEXTS,
        tuple(TEXTS),
        iter(TEXTS),
        np.array(TEXTS),
        [{"text": text, "id": 7} for text in TEXTS],
        datasets.Dataset.from_dict({"text": TEXTS}),
        datasets.Dataset.from_dict({"text": TEXTS})["text"],
    ],
    ids=lambda calib: type(calib).__name__,
)
def test_texts_are_cut_as_those_of_a_file(tmp_path, calib):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    expected = calibration_tokens(str(path), zoo.tokenizer(), 8, 16, seed=3)
    assert torch.equal(windows(calib), expected)


def test_conversations():
    messages = [{"role": "user", "content": "hi"}]
    expected = Text("list of 2 texts", [messages, "plain"], "\n\n")
    assert given([messages, "plain"], chat=True) == expected
    assert given([{"messages": messages, "text": "x"}, {"text": "plain"}], chat=True) == expected
    with pytest.raises(DataError, match=r"list of 1 texts: record 1 .*\n.*--chat"):
        given([{"messages": messages}])
    with pytest.raises(DataError, match=r"list of 1 texts: record 1 .*\n.*--chat"):
        windows([messages])


@pytest.mark.parametrize(
    "calib",
    [
        IDS,
        IDS.tolist(),
        list(IDS),
        [row[None] for row in IDS],
        IDS.numpy(),
        list(IDS.numpy().astype(np.int32)),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        [{"input_ids": row.tolist(), "attention_mask": [1] * 8} for row in IDS],
        [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}],
        datasets.Dataset.from_dict({"input_ids": IDS.tolist()}),
    ],
    ids=lambda calib: type(calib).__name__,
)
def test_ids(calib):
    found = given(calib)
    assert torch.equal(calibration_tokens(found, None, 1, 1, 0), IDS)


@pytest.mark.parametrize(
    ("calib", "cause", "remedy"),
    [
        ([], "list of calibration texts is empty", "put texts"),
        ([[1, 2, 3], [1, 2]], "not rows of one length", "or texts"),
        ([[1, 2], ["a", "b"]], "not rows of one length", "or texts"),
        ([{"input_ids": [1, 2]}, {"text": "x"}], "not rows of one length", "or texts"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], "are padded", "without padding"),
        ([[4.5, 2.0]], "are torch.float32", "pass integers"),
        ([1, 2, 3], "a flat list of numbers", "calib=[ids]"),
        (np.arange(3), "a flat list of numbers", "calib=[ids]"),
        (list(torch.arange(3)), "a flat list of numbers", "calib=[ids]"),
        ({"text": TEXTS}, "is a dict of text, not a text", "calib=data['text']"),
        (datasets.DatasetDict(train=ROWS, test=ROWS), "a dict of train, test", "one of its keys"),
        (["x" * 9999, None], "record 2 has no field `text`", '{"text": "..."}'),
        ([{"body": "x" * 9999}], "record 1 has no field `text`", '{"text": "..."}'),
    ],
)
def test_what_is_refused_is_refused_briefly(calib, cause, remedy):
    with pytest.raises(DataError) as caught:
        windows(calib)
    assert cause in caught.value.cause and remedy in caught.value.remedy
    assert len(str(caught.value)) < 300 and "xx" not in str(caught.value)
