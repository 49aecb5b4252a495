"""What is kept of a model predicts what it does: of every row of the zoo, streamed or not."""

import gc
import weakref

import pytest
import torch
import zoo
import zoo_configs as configs

from optq.errors import ModelError, OutputError
from optq.model import predictions as room
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.predictions import predictions, streamed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(room, "BATCH_TOKENS", 48)  # two windows


EXPERTS = tuple(zoo.Row(name, getattr(configs, name), "", ()) for name in ("mixtral", "qwen3_moe"))


@pytest.mark.parametrize("row", (*zoo.ROWS, *zoo.MULTIMODAL, *EXPERTS), ids=lambda row: row.name)
def test_they_are_those_of_the_model(row, tmp_path):
    texts = [zoo.token_ids(3, 24), zoo.token_ids(2, 24, seed=1)]
    model = row.build()
    with torch.no_grad():
        wanted = [model(input_ids=windows, use_cache=False).logits for windows in texts]
    tolerance = 1e-4 if row.dtype == torch.float32 else 5e-2
    kept = predictions(row.build(), texts)
    away = streamed(Checkpoint.open(str(zoo.save(row, tmp_path))), find_blocks, texts, CPU)
    for made in (kept, away):
        for own, logits in zip(made, wanted, strict=True):
            whole = own.logits(0, len(logits))
            torch.testing.assert_close(whole, logits, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(own.logits(1, 1), whole[1:2], rtol=1e-4, atol=1e-4)


def test_the_body_is_let_go():
    model = next(row for row in zoo.ROWS if row.name == "llama").build()
    gone = weakref.ref(model.model)
    kept = predictions(model, [zoo.token_ids(1, 8)])
    del model
    gc.collect()
    assert gone() is None and kept[0].logits(0, 1).shape[:2] == (1, 8)


def test_what_memory_has_no_room_for_is_in_a_file(monkeypatch):
    row, windows = next(row for row in zoo.ROWS if row.name == "llama"), zoo.token_ids(3, 24)
    (there,) = predictions(row.build(), [windows])
    monkeypatch.setattr(room, "free", lambda device: 100)
    (away,) = predictions(row.build(), [windows])
    assert torch.equal(away.hidden, there.hidden) and torch.equal(
        away.logits(0, 3), there.logits(0, 3)
    )
    monkeypatch.setattr(room.tempfile, "tempdir", "/nowhere")
    with pytest.raises(OutputError, match="no room in /nowhere"):
        predictions(row.build(), [windows])


def test_a_model_without_a_head():
    model = next(row for row in zoo.ROWS if row.name == "llama").build()
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="has no head"):
        predictions(model, [zoo.token_ids(1, 8)])


def test_a_model_that_asks_for_its_body_behind_its_head():
    model = next(row for row in zoo.ROWS if row.name == "llama").build()
    own = type(model).forward

    def forward(self, **named):
        made = own(self, **named)
        made.logits = made.logits * self.model.embed_tokens_scale
        return made

    model.forward = forward.__get__(model)
    model.model.embed_tokens_scale = torch.tensor(2.0)
    (kept,) = predictions(model, [zoo.token_ids(1, 8)])
    with pytest.raises(ModelError, match="its body's embed_tokens_scale"):
        kept.logits(0, 1)
