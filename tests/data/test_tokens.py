"""Windows of token ids, for calibration and for evaluation."""

import json
import random

import datasets
import pytest
import torch
import zoo

from optq.data.calibration import calibration_tokens
from optq.data.evaluation import C4_WINDOWS, evaluation_tokens
from optq.errors import DataError, SettingError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.fixture
def tokenizer():
    return zoo.tokenizer()


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def with_bos(tokenizer):
    """A tokenizer that opens every text with <s>, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def prose(tmp_path):
    """A text of which every window of 8 tokens is different."""
    words = " ".join(str(number) for number in range(1000, 2000))
    path = tmp_path / "prose.txt"
    path.write_text(words)
    return str(path)


def c4_of(documents, monkeypatch):
    def load_dataset(*_, **__):
        return datasets.Dataset.from_dict({"text": documents})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def ids_of(tokenizer, path, **options):
    with open(path) as file:
        return tokenizer(file.read(), **options)["input_ids"]


def places(stream, windows):
    """Where each window lies in the stream; fails if one does not."""
    where = {
        tuple(stream[i : i + len(windows[0])]): i for i in range(len(stream) - len(windows[0]) + 1)
    }
    return [where[tuple(window)] for window in windows.tolist()]


def test_calibration_windows_are_cut_from_the_stream(tokenizer, prose):
    windows = calibration_tokens(prose, tokenizer, nsamples=40, seqlen=8, seed=0)
    assert windows.shape == (40, 8) and windows.dtype == torch.int64
    starts = places(ids_of(tokenizer, prose), windows)
    assert len(set(starts)) > 30


def test_calibration_windows_are_those_of_the_gptq_code(tokenizer, prose):
    """The reference's lines, with Python's own generator."""
    stream = ids_of(tokenizer, prose)
    random.seed(3)
    expected = []
    for _ in range(20):
        i = random.randint(0, len(stream) - 16 - 1)
        expected.append(stream[i : i + 16])
    assert calibration_tokens(prose, tokenizer, 20, 16, seed=3).tolist() == expected


def test_the_seed_decides(tokenizer, prose):
    first = calibration_tokens(prose, tokenizer, 8, 16, seed=1)
    random.seed(99)  # nobody else's generator matters
    torch.manual_seed(99)
    assert torch.equal(first, calibration_tokens(prose, tokenizer, 8, 16, seed=1))
    assert not torch.equal(first, calibration_tokens(prose, tokenizer, 8, 16, seed=2))


def test_a_text_of_one_sequence_and_less(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh")
    length = len(tokenizer("abcdefgh")["input_ids"])
    windows = calibration_tokens(str(path), tokenizer, 2, length, seed=0)
    assert windows.tolist() == [tokenizer("abcdefgh")["input_ids"]] * 2
    assert evaluation_tokens(str(path), tokenizer, length).tolist() == windows[:1].tolist()
    for call in (
        lambda: calibration_tokens(str(path), tokenizer, 2, length + 1, seed=0),
        lambda: evaluation_tokens(str(path), tokenizer, length + 1),
    ):
        with pytest.raises(DataError, match=f"has {length} tokens.* {length + 1}\n.*longer text"):
            call()


@pytest.mark.parametrize("options", [{"nsamples": 0}, {"seqlen": 0}, {"seqlen": -1}])
def test_bad_sizes(tokenizer, prose, options):
    with pytest.raises(SettingError, match=f"{next(iter(options))} is "):
        calibration_tokens(prose, tokenizer, **({"nsamples": 1, "seqlen": 8, "seed": 0} | options))


@pytest.mark.parametrize("seqlen", [1, 0, -5])
def test_an_evaluation_window_needs_a_token_to_predict(tokenizer, prose, seqlen):
    with pytest.raises(SettingError, match="choose 2 or more"):
        evaluation_tokens(prose, tokenizer, seqlen)


def test_evaluation_windows_are_the_stream_cut_up(tokenizer, prose):
    stream = ids_of(tokenizer, prose)
    windows = evaluation_tokens(prose, tokenizer, 64)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(stream) // 64, 64)
    assert len(stream) % 64  # so that there is a last window to drop
    assert windows.flatten().tolist() == stream[: windows.numel()]


def test_special_tokens_open_the_stream_and_not_the_windows(with_bos, prose):
    windows = evaluation_tokens(prose, with_bos, 64)
    assert (windows == with_bos.bos_token_id).nonzero().tolist() == [[0, 0]]


def test_a_long_text_is_neither_cut_nor_warned_about(tokenizer, prose, caplog, capfd):
    import transformers

    transformers.utils.logging.enable_propagation()
    tokenizer.model_max_length = 16
    tokenizer.backend_tokenizer.enable_truncation(16)
    try:
        assert evaluation_tokens(prose, tokenizer, 64).shape[0] > 20
        calibration_tokens(prose, tokenizer, 4, 64, seed=0)
        assert "longer than" not in caplog.text + "".join(capfd.readouterr())
        ids_of(tokenizer, prose)
        assert "longer than" in caplog.text  # the warning is still there to be avoided
    finally:
        transformers.utils.logging.disable_propagation()


def test_c4_windows_lie_inside_long_documents(with_bos, monkeypatch):
    long = [" ".join(str(n) for n in range(start, start + 20)) for start in (1000, 2000, 3000)]
    documents = ["short", long[0], "", long[1], "also short", long[2]]
    c4_of(documents, monkeypatch)
    windows = calibration_tokens("c4", with_bos, nsamples=30, seqlen=32, seed=5)
    streams = [with_bos(document)["input_ids"] for document in documents]

    random.seed(5)  # the GPTQ code's lines
    expected = []
    for _ in range(30):
        while True:
            stream = streams[random.randint(0, len(documents) - 1)]
            if len(stream) > 32:
                break
        i = random.randint(0, len(stream) - 32 - 1)
        expected.append(stream[i : i + 32])
    assert windows.tolist() == expected
    assert torch.equal(windows, calibration_tokens("c4", with_bos, 30, 32, seed=5))

    evaluated = evaluation_tokens("c4", with_bos, 32)
    assert evaluated.shape == (C4_WINDOWS, 32)
    assert torch.equal(evaluated, calibration_tokens("c4", with_bos, C4_WINDOWS, 32, seed=0))


def test_c4_without_a_long_document(tokenizer, monkeypatch):
    c4_of(["one two three", "four"], monkeypatch)
    longest = len(tokenizer("one two three")["input_ids"])
    for call in (
        lambda: calibration_tokens("c4", tokenizer, 1, longest, seed=0),
        lambda: evaluation_tokens("c4", tokenizer, longest),
    ):
        with pytest.raises(DataError, match=f"more than {longest} tokens; .* has {longest}\n"):
            call()
    assert calibration_tokens("c4", tokenizer, 1, longest - 1, seed=0).shape == (1, longest - 1)


@pytest.mark.parametrize("chat", [False, True])
def test_c4_documents_of_too_few_bytes_are_drawn_but_not_tokenized(chatty, monkeypatch, chat):
    """Bytes and not characters: a tokenizer may fall back on them."""
    asked = []

    class Counting:
        chat_template, apply_chat_template = TEMPLATE, staticmethod(chatty.apply_chat_template)

        def __call__(self, text, **options):
            asked.append(text)
            bytes_alone = "ü" in text
            return {"input_ids": [*text.encode()] if bytes_alone else [*text.encode()][::4]}

    documents = ["short", "x" * 80, "ü" * 40, "y" * 200]  # bytes: 5, 80, 80, 200
    c4_of(documents, monkeypatch)
    progress = []
    windows = calibration_tokens(
        "c4", Counting(), 30, 48, 5, chat, lambda *step: progress.append(step)
    )
    assert windows.shape == (30, 48)
    assert not any("short" in text for text in asked)
    assert sum("x" in text for text in asked) == 1  # long enough to ask, then known to be short
    assert any("ü" in text for text in asked)
    assert progress == [(done, 30) for done in range(1, 31)]

    asked.clear()
    with pytest.raises(DataError, match="more than 4000 tokens; the longest has "):
        calibration_tokens("c4", Counting(), 1, 4000, 0, chat)
    assert not any("short" in text for text in asked)
    expected = max(
        len(Counting()(chat_of(chatty, d) if chat else d)["input_ids"]) for d in documents
    )
    with pytest.raises(DataError, match=f"the longest has {expected}\n"):
        calibration_tokens("c4", Counting(), 1, 4000, 0, chat)


def chat_of(tokenizer, text):
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)


def test_half_a_surrogate_pair(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "ab" * 40 + '\\ud83d"}')
    with pytest.raises(DataError, match=f"the tokenizer refuses {path}: .*\n.*surrogate"):
        calibration_tokens(str(path), tokenizer, 1, 8, seed=0)
    c4_of(["ab" * 40], monkeypatch)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="the tokenizer refuses record 1 of c4: division by zero"):
        calibration_tokens("c4", tokenizer, 1, 8, seed=0)


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
JOINING = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
ITERATING = (
    "{% for m in messages %}<s>{{ m.role }}: {% for part in m.content %}({{ part.text }})"
    "{% endfor %}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (JOINING, "<s>user: one two\n"),  # raises TypeError on a list
        (TEMPLATE, "<s>user: one two\n"),  # prints a list as Python does
        (ITERATING, "<s>user: (one )(two)"),  # is made for lists
    ],
    ids=["joining", "printing", "iterating"],
)
def test_a_content_of_typed_parts(tokenizer, tmp_path, template, expected):
    tokenizer.chat_template = template
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": PARTS}]}))
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    windows = calibration_tokens(str(path), tokenizer, 1, len(ids), seed=0, chat=True)
    assert windows.tolist() == [ids]


@pytest.mark.parametrize("template", [JOINING, TEMPLATE], ids=["joining", "printing"])
def test_a_part_that_is_no_text(tokenizer, tmp_path, template):
    tokenizer.chat_template = template
    content = [*PARTS, {"type": "image", "url": "x.png"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    with pytest.raises(DataError, match="the chat template refuses record 1") as caught:
        calibration_tokens(str(path), tokenizer, 1, 8, seed=0, chat=True)
    assert "x.png" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",  # TypeError
        "{{ messages[0].content.pop('x') }}",  # of jinja's: UndefinedError, SecurityError
        "{{ messages[9].content.x }}",
        "{{ 1 // 0 }}",  # ZeroDivisionError
        "{% for %}",  # a syntax error
    ],
)
def test_whatever_a_template_raises_names_the_record(tokenizer, tmp_path, template):
    tokenizer.chat_template = template
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the end"}')
    with pytest.raises(DataError, match=r"a.jsonl: the chat template refuses record 1: ") as caught:
        calibration_tokens(str(path), tokenizer, 1, 8, seed=0, chat=True)
    assert caught.value.__cause__ is not None


def test_chat_makes_each_document_a_message(chatty, tmp_path):
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    records = [{"text": "first"}, {"text": "  "}, {"messages": messages}]
    path.write_text("\n".join(map(json.dumps, records)))
    expected = "<s>user: first\n<s>user: hi\n<s>assistant: there\n"
    ids = chatty(expected)["input_ids"]
    windows = calibration_tokens(str(path), chatty, 1, len(ids), seed=0, chat=True)
    assert windows.tolist() == [ids]
    assert ids.count(chatty.bos_token_id) == 3


def test_chat_adds_no_special_tokens_of_its_own(with_bos, tmp_path):
    with_bos.chat_template = TEMPLATE
    path = tmp_path / "a.txt"
    path.write_text("hello")
    ids = with_bos("<s>user: hello\n", add_special_tokens=False)["input_ids"]
    windows = calibration_tokens(str(path), with_bos, 1, len(ids), seed=0, chat=True)
    assert windows.tolist() == [ids]


def test_chat_in_c4(chatty, monkeypatch):
    c4_of(["abcdefghij" * 4, "short"], monkeypatch)
    windows = calibration_tokens("c4", chatty, 16, 32, seed=0, chat=True)
    places(chatty("<s>user: " + "abcdefghij" * 4 + "\n")["input_ids"], windows)


def test_chat_without_a_template(tokenizer, prose):
    with pytest.raises(DataError, match="no chat template"):
        calibration_tokens(prose, tokenizer, 1, 8, seed=0, chat=True)


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "record 2 is not a list of messages"),
        (["hi"], "record 2 is not a list of messages"),
        ([{"content": "hi"}], "record 2 is not a list of messages"),
        ([{"role": "tool", "content": "x"}], "the chat template refuses record 2: no tools"),
    ],
)
def test_conversations_that_the_template_cannot_take(chatty, tmp_path, messages, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"text": "fine"}, {"messages": messages}])))
    with pytest.raises(DataError, match=complaint):
        calibration_tokens(str(path), chatty, 1, 8, seed=0, chat=True)


def test_token_ids_are_taken_as_they_are(tokenizer):
    ids = torch.arange(24).reshape(3, 8)
    assert calibration_tokens(ids, tokenizer, nsamples=128, seqlen=2048, seed=0) is ids
    narrow = calibration_tokens(ids.int(), tokenizer, 128, 2048, seed=0)
    assert narrow.dtype == torch.int64 and torch.equal(narrow, ids)


@pytest.mark.parametrize(
    "ids",
    [
        torch.arange(8),
        torch.zeros(2, 3, 4, dtype=torch.int64),
        torch.zeros(2, 8),
        torch.zeros(2, 8, dtype=torch.bool),
        torch.zeros(0, 8, dtype=torch.int64),
    ],
)
def test_token_ids_of_the_wrong_kind(tokenizer, ids):
    with pytest.raises(DataError, match=r"calibration ids are .*\n.*\[samples, seqlen\]"):
        calibration_tokens(ids, tokenizer, 1, 8, seed=0)
