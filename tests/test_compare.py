"""Measuring as a program does it; the demo's rows are tested with the command."""

import pytest
import zoo

from optq import ModelConfig, compare
from optq.errors import SettingError

TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    (row,) = (row for row in zoo.ROWS if row.name == "llama")
    return ModelConfig(str(zoo.save(row, tmp_path_factory.mktemp("llama") / "model")), "cpu")


def test_measure_reports_progress_to_the_end(config, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    seen = []
    result, seqlen = compare.measure(
        config, str(tmp_path / "text.txt"), progress=lambda *step: seen.append(step)
    )
    assert seqlen == 64 and result.tokens == result.windows * 63
    done, total, note = seen[-1]
    assert done == total > 0 and note == f"{result.windows} windows of 64 tokens"
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)
    again, _ = compare.measure(config, str(tmp_path / "text.txt"), seqlen)
    assert again == result


def test_measure_refuses_more_than_the_positions(config):
    with pytest.raises(SettingError, match="64 positions"):
        compare.measure(config, "demo", 65)
