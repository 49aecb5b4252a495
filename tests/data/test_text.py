"""Names, files and datasets: what is read, what it is read with, and what is refused."""

import json

import datasets
import pytest

from optq.data.text import read_text
from optq.errors import DataError

ROWS = {"text": ["one fish", "two fish", ""], "sentence": ["red", "blue", "old"], "n": [1, 2, 3]}


def write(path, content):
    path.write_text(content, encoding="utf-8", newline="")
    return str(path)


def refusal(spec, use="calibration", **options):
    with pytest.raises(DataError) as caught:
        list(read_text(spec, use, **options).strings())
    assert "\n" not in caught.value.cause + caught.value.remedy
    return caught.value


@pytest.fixture
def hub(monkeypatch):
    """``datasets.load_dataset`` with a local stand-in for the Hub; gives the calls it got."""
    calls = []

    def load_dataset(*where, **options):
        calls.append((where, options))
        return datasets.Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_the_demo_texts_are_held_out_from_each_other():
    calibration = read_text("demo", "calibration").whole()
    evaluation = read_text("demo", "evaluation").whole()
    assert "class Calendar" in calibration and "class Calendar" not in evaluation
    assert "class ArgumentParser" in evaluation and "class ArgumentParser" not in calibration


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
def test_a_text_file_is_one_document(tmp_path, use):
    text = read_text(write(tmp_path / "a.txt", "\ufeffKöln\r\n\nzwei\n"), use)
    assert text.whole() == "Köln\n\nzwei\n"  # no byte-order mark, one kind of line end


def test_jsonl_records_are_joined_by_two_newlines(tmp_path):
    lines = ['{"text": "one\\nline"}', "", '{"text": "two\u2028three", "id": 7}', ""]
    text = read_text(write(tmp_path / "a.jsonl", "\n".join(lines)), "evaluation")
    assert text.whole() == "one\nline\n\ntwo\u2028three"


def test_a_broken_jsonl_line_is_named(tmp_path):
    good = '{"text": "x"}\n\n'
    for bad, complaint in {
        '{"text": ': "is not JSON",
        '["text"]': "has no field `text`",
        '{"txt": "x"}': "has no field `text`",
        '{"text": null}': "has no field `text`",
    }.items():
        error = refusal(write(tmp_path / "a.jsonl", good + bad))
        assert "line 3" in error.cause and complaint in error.cause


def test_a_json_file_is_an_array_or_lines(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    records = ["one", {"text": "two\nlines"}, {"text": "three", "messages": messages}]
    path = write(tmp_path / "a.json", json.dumps(records, indent=1))
    assert read_text(path, "evaluation").whole() == "one\n\ntwo\nlines\n\nthree"
    assert list(read_text(path, "calibration", chat=True).documents)[2] == messages
    path = write(tmp_path / "b.json", '{"text": "x"}\n\n{"text": "y"}\n')
    assert read_text(path, "evaluation").whole() == "x\n\ny"
    for content, complaint in {
        '["x", ': "b.json is not JSON",
        '["x", 5]': "b.json, record 2 has no field `text`",
        '{"text": "x"}\n{': "b.json, line 2 is not JSON",
        '{\n"text": "x"}': "b.json, line 1 is not JSON",
        "[]": "b.json has no text",
    }.items():
        with pytest.raises(DataError, match=complaint):
            read_text(write(tmp_path / "b.json", content), "calibration").whole()


def test_a_text_in_the_place_of_a_name_is_not_repeated(hub, tmp_path):
    for spec in ("one word and another " * 500, "x" * 5000 + ".txt"):
        error = refusal(spec)
        assert len(error.cause) < 300 and spec[:20] in error.cause


def test_conversations_are_for_chat(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    line = json.dumps({"messages": messages, "text": "plain"})
    path = write(tmp_path / "a.jsonl", line)
    assert read_text(path, "calibration", chat=True).documents == [messages]
    assert read_text(path, "calibration").documents == ["plain"]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}))
    assert "--chat" in refusal(path).remedy
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": "hi"}))
    assert "line 1 has no field" in refusal(path, chat=True).cause


def test_files_that_cannot_be_read(tmp_path):
    assert "there is no file" in refusal(str(tmp_path / "a.txt")).cause
    assert "has no text" in refusal(write(tmp_path / "b.txt", " \n\n")).cause
    assert "has no text" in refusal(write(tmp_path / "b.jsonl", "")).cause
    (tmp_path / "c.txt").write_bytes(b"abc\xff\xfe")
    error = refusal(str(tmp_path / "c.txt"))
    assert "byte 3" in error.cause and "UTF-8" in error.remedy
    (tmp_path / "d.txt").mkdir()
    assert "cannot be read" in refusal(str(tmp_path / "d.txt")).cause


def test_records_that_are_all_empty(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": " "}')
    with pytest.raises(DataError, match="has no text"):
        read_text(path, "evaluation").whole()


@pytest.mark.parametrize("spec", ["wikitext", "c4.csv", "demo:train", "", "a:b:c:", "readme.md"])
def test_an_unknown_name_lists_the_choices(spec):
    remedy = refusal(spec).remedy
    for choice in ("demo", "wikitext2", "ptb", "c4", ".txt", ".jsonl", "NAME:SPLIT:COLUMN"):
        assert choice in remedy


@pytest.mark.parametrize("use, split", [("calibration", "train"), ("evaluation", "test")])
def test_wikitext2(hub, use, split):
    text = read_text("wikitext2", use)
    assert hub == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": split})]
    assert text.whole() == "one fish\n\ntwo fish\n\n"
    assert not text.by_document


@pytest.mark.parametrize("use, split", [("calibration", "train"), ("evaluation", "test")])
def test_ptb(hub, use, split):
    text = read_text("ptb", use)
    files = {split: f"penn_treebank/{split}/0000.parquet"}
    options = {"revision": "refs/convert/parquet", "data_files": files, "split": split}
    assert hub == [(("ptb-text-only/ptb_text_only",), options)]
    assert text.whole() == "red blue old"
    assert not text.by_document


@pytest.mark.parametrize(
    "use, split, file",
    [
        ("calibration", "train", "en/c4-train.00000-of-01024.json.gz"),
        ("evaluation", "validation", "en/c4-validation.00000-of-00008.json.gz"),
    ],
)
def test_c4(hub, use, split, file):
    text = read_text("c4", use)
    options = {"data_files": {split: file}, "split": split, "verification_mode": "no_checks"}
    assert hub == [(("allenai/c4",), options)]
    assert list(text.documents) == ROWS["text"]
    assert text.by_document


@pytest.mark.parametrize(
    "spec, where, split",
    [
        ("squad:train:text", ("squad",), "train"),
        ("owner/name:test:text", ("owner/name",), "test"),
        ("owner/name/config-1.0:test:text", ("owner/name", "config-1.0"), "test"),
        ("owner/name:train[:10%]:text", ("owner/name",), "train[:10%]"),
        ("owner/name:train_sft[5:7]:text", ("owner/name",), "train_sft[5:7]"),
    ],
)
def test_the_parts_of_a_dataset_spec(hub, spec, where, split):
    assert list(read_text(spec, "calibration").documents) == ROWS["text"]
    assert hub == [(where, {"split": split})]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Keeps what ``datasets`` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


SAVE = {
    "json": datasets.Dataset.to_json,
    "csv": datasets.Dataset.to_csv,
    "parquet": datasets.Dataset.to_parquet,
}


@pytest.mark.parametrize("kind", SAVE)
def test_local_files_and_folders(tmp_path, cache, kind):
    rows = {"text": ["one", "two", "three"], "n": [1, 2, 3]}
    folder = tmp_path / "nested" / "folder"
    folder.mkdir(parents=True)
    file = folder / f"test.{kind}"
    SAVE[kind](datasets.Dataset.from_dict(rows), str(file))
    for name in (folder, file):
        assert read_text(f"{name}:test:text", "evaluation").whole() == "one\n\ntwo\n\nthree"
        assert list(read_text(f"{name}:test[1:]:text", "evaluation").documents) == ["two", "three"]
        error = refusal(f"{name}:test:body")
        assert "'body'" in error.cause and error.remedy.endswith("text, n")
        assert "is int, not text" in refusal(f"{name}:test:n").cause
    assert "train" in refusal(f"{folder}:train:text").cause  # what the package says of the split


def test_records_without_text(tmp_path, cache):
    messages = [{"role": "user", "content": "hi"}]
    for values, found in ((["x", None], "NoneType"), ([messages, messages], "a conversation")):
        path = tmp_path / f"{len(found)}.parquet"
        datasets.Dataset.from_dict({"column": values}).to_parquet(str(path))
        assert found in refusal(f"{path}:train:column").cause


def test_an_empty_split(tmp_path, cache):
    path = tmp_path / "a.parquet"
    strings = datasets.Features({"text": datasets.Value("string")})
    datasets.Dataset.from_dict({"text": []}, strings).to_parquet(str(path))
    assert "no data" in refusal(f"{path}:train:text").cause  # the package says so


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
@pytest.mark.parametrize("spec", ["wikitext2", "ptb", "c4", "owner/name:train:text"])
def test_without_a_network(tmp_path, cache, monkeypatch, spec, use):
    # What HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1 set; the packages read those once, on import.
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    error = refusal(spec, use)
    assert error.cause.startswith(f"{spec} cannot be loaded: ")
    for choice in ("demo", ".txt", ".jsonl"):
        assert choice in error.remedy
