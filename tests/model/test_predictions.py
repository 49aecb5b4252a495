"""What is kept of a model predicts what it does: of every row of the zoo, streamed or not."""

import pytest
import torch
import zoo

from optq.errors import ModelError, OutputError
from optq.model import predictions as room
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.predictions import predictions, streamed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(room, "BATCH_TOKENS", 48)  # two windows


@pytest.mark.parametrize("row", zoo.ROWS + zoo.MULTIMODAL, ids=lambda row: row.name)
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
