"""The run record: a document with a version, read by all that come after the run."""

import json

import pytest

from optq.errors import ModelError
from optq.record import FILE, LayerRecord, RunRecord

LAYER = LayerRecord(
    name="a.b", rows=8, cols=4, error=0.5, relative_error=0.1, rtn_error=0.75, damp=0.01, seconds=3
)
RECORD = RunRecord(
    optq="0.1.0",
    method="gptq",
    quantizer={"wbits": 4},
    qep=None,
    calibration={"text": "demo", "samples": 2},
    bits_per_weight=4.25,
    bytes=1000,
    dense=["a.c"],
    layers=[LAYER],
)


def test_what_is_written_is_read_back_without_its_times(tmp_path):
    (tmp_path / FILE).write_text(RECORD.text())
    back = RunRecord.read(tmp_path / FILE)
    assert LAYER.seconds == 3 and "seconds" not in RECORD.text()
    assert back == RECORD.model_copy(update={"layers": [LAYER.model_copy(update={"seconds": 0})]})
    assert json.loads(RECORD.text())["version"] == 1


def test_a_file_from_before_there_were_versions(tmp_path):
    made = json.loads(RECORD.text())
    del made["version"], made["layers"][0]["calls"]
    (tmp_path / FILE).write_text(json.dumps(made))
    back = RunRecord.read(tmp_path / FILE)
    assert back.version == 1 and back.layers[0].calls == 1 and back.layers[0].error == 0.5


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        (RECORD.text()[:-20], "is damaged", "delete it"),
        (RECORD.text().replace('"bytes": 1000', '"bytes": "many"'), "is damaged", "delete it"),
        ("[]", "is damaged", "delete it"),
        ('{"version": "x"}', "is damaged", "delete it"),
        ('{"version": 2}', "is of version 2, newer than this OPTQ", "update OPTQ"),
    ],
)
def test_a_file_that_is_not_ours_to_read(tmp_path, text, cause, remedy):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError) as caught:
        RunRecord.read(tmp_path / FILE)
    assert cause in caught.value.cause and remedy in caught.value.remedy
    assert "\n" not in caught.value.cause + caught.value.remedy
