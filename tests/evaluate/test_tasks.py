"""Tasks through lm-eval: a local one, scored by hand. Skipped where lm-eval is not installed."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import zoo

from optq.errors import DataError, OptqError, SettingError
from optq.evaluate.tasks import ZeroShot


@pytest.fixture(scope="module")
def llama():
    return next(row for row in zoo.ROWS if row.name == "llama").build()


@pytest.fixture
def harness(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval.models.huggingface")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


CHOICES = ["the", "of", "in", "on"]


def questions(count):
    return [{"q": f"{i} and {i} is", "choices": CHOICES, "gold": i % 4} for i in range(count)]


def local_task(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def likeliest(model, tokenizer, question):
    scores = []
    start = len(tokenizer(question)["input_ids"])
    for choice in CHOICES:
        ids = torch.tensor(tokenizer(f"{question} {choice}")["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        scores.append(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return max(range(len(CHOICES)), key=scores.__getitem__)


def test_a_local_task_is_scored_as_by_hand(harness, llama, tmp_path):
    tokenizer, rows = zoo.tokenizer(), questions(12)
    right = [likeliest(llama, tokenizer, row["q"]) == row["gold"] for row in rows]
    assert 0 < sum(right) < len(right)
    task = local_task(tmp_path / "rows.jsonl", rows)
    assert ZeroShot([task]).run(llama, tokenizer) == {"local": {"acc": sum(right) / 12}}
    assert ZeroShot([task], 5).run(llama, tokenizer) == {"local": {"acc": sum(right[:5]) / 5}}


def test_an_unknown_task(harness):
    with pytest.raises(DataError, match="no task called 'nope'"):
        ZeroShot(["nope"])


def test_a_task_whose_data_is_out_of_reach(harness, llama):
    with pytest.raises(DataError, match="cannot be reached"):  # the tests run offline
        ZeroShot(["piqa"]).run(llama, zoo.tokenizer())


def test_whatever_the_harness_raises(llama, monkeypatch):
    """A stand-in for it: what a task's own files raise is of any kind."""
    fault = KeyError("choices")

    def fails(**_):
        raise fault

    whole = {"simple_evaluate": fails, "HFLM": lambda **_: None}
    whole["TaskManager"] = lambda: SimpleNamespace(match_tasks=lambda tasks: tasks)
    for module in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**whole))
    with pytest.raises(DataError, match=r"a task cannot be run, .*: KeyError: 'choices'") as caught:
        ZeroShot(["piqa"]).run(llama, zoo.tokenizer())
    assert caught.value.__cause__ is fault


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptqError, match="pip install lm-eval accelerate"):
        ZeroShot(["piqa"])


def test_settings_without_sense():
    with pytest.raises(SettingError, match="no task"):
        ZeroShot([])
    with pytest.raises(SettingError, match="limit is 0"):
        ZeroShot(["piqa"], limit=0)
