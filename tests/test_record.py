"""The run record: a document with a version, read by all that come after the run."""

import json
from pathlib import Path

import decoder
import numpy as np
import pytest
import torch
import zoo

from optq import GPTQ, RTN, ModelConfig, Runner
from optq.errors import ModelError
from optq.record import FILE, TIMES, LayerRecord, RunRecord, Times

DOCS = Path(__file__).parents[1] / "docs"

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
    assert json.loads(RECORD.text())["version"] == 2


def test_a_file_from_before_there_were_versions(tmp_path):
    made = json.loads(RECORD.text())
    new = {"calls", "block", "site", "wbits", "histogram", "at_ends", "scale_min", "scale_max"}
    del made["version"], made["sites"], made["blocks"]
    made["layers"][0] = {name: v for name, v in made["layers"][0].items() if name not in new}
    (tmp_path / FILE).write_text(json.dumps(made))
    back = RunRecord.read(tmp_path / FILE)
    assert back.version == 2 and back.layers[0].calls == 1 and back.layers[0].error == 0.5
    assert back.blocks == back.sites == back.layers[0].histogram == []
    assert back.layers[0].wbits is None


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        (RECORD.text()[:-20], "is damaged", "delete it"),
        (RECORD.text().replace('"bytes": 1000', '"bytes": "many"'), "is damaged", "delete it"),
        (RECORD.text().replace('"error": 0.5', '"error": NaN'), "is damaged", "delete it"),
        ("[]", "is damaged", "delete it"),
        ('{"version": "x"}', "is damaged", "delete it"),
        ('{"version": 3}', "is of version 3, newer than this OPTQ", "update OPTQ"),
    ],
)
def test_a_file_that_is_not_ours_to_read(tmp_path, text, cause, remedy):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError) as caught:
        RunRecord.read(tmp_path / FILE)
    assert cause in caught.value.cause and remedy in caught.value.remedy
    assert "\n" not in caught.value.cause + caught.value.remedy


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    row = next(row for row in zoo.ROWS if row.name == "llama")
    return row, zoo.save(row, tmp_path_factory.mktemp("record") / "model")


def run(folder, out, quantizer, qep):
    calib = zoo.token_ids(12, 48)
    config = ModelConfig(str(folder), "cpu")
    return Runner(config, quantizer, qep, calib=calib, output=out).run()


@pytest.mark.parametrize(
    ("quantizer", "bins"),
    [(GPTQ(3, 32), 8), (RTN(8, 32), 16), (GPTQ(2, -1, sym=False), 4)],
    ids=str,
)
def test_codes_and_scales_are_those_of_the_file(llama, tmp_path, quantizer, bins):
    _, folder = llama
    out = tmp_path / "out"
    run(folder, out, quantizer, False)
    record, read = RunRecord.read(out / FILE), decoder.decode_folder(out)
    assert len(record.layers) == len(read) == 21
    for layer in record.layers:
        codes, scales = read[layer.name].codes, read[layer.name].scales
        width = 2**quantizer.wbits
        counts = np.bincount(codes.flatten(), minlength=width).reshape(bins, -1).sum(1)
        assert layer.histogram == counts.tolist() and layer.wbits == quantizer.wbits
        assert layer.at_ends == pytest.approx(((codes == 0) | (codes == width - 1)).mean())
        assert (layer.scale_min, layer.scale_max) == (scales.min().item(), scales.max().item())
        assert layer.name.startswith(f"{layer.block}.")
    assert [block.block for block in record.blocks] == [f"model.layers.{i}" for i in range(3)]
    assert all(block.error is None for block in record.blocks)  # one stream ran


def test_the_error_behind_each_block_is_the_models_own(llama, tmp_path):
    """That of the quantized model's hidden states, by a plain forward of both."""
    row, folder = llama
    result = run(folder, tmp_path / "out", GPTQ(2, 32), True)
    original, tokens, states = row.build(), zoo.token_ids(12, 48), []
    for model in (original, result.model):
        hidden = []
        for block in model.model.layers:
            block.register_forward_hook(lambda module, args, made, to=hidden: to.append(made))
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        states.append([h[0] if isinstance(h, tuple) else h for h in hidden])
    assert len(result.record.blocks) == 3
    for block, full, own in zip(result.record.blocks, *states, strict=True):
        expected = (own - full).square().sum() / full.square().sum()
        assert block.error == pytest.approx(expected.item(), rel=1e-3)
    assert [b.error for b in result.record.blocks] == sorted(b.error for b in result.record.blocks)


def test_the_diagonal_stands_in_the_order_of_the_sweep(llama, tmp_path):
    _, folder = llama
    plain, ordered = (
        run(folder, tmp_path / str(order), GPTQ.plain(4, -1, actorder=order), False).record
        for order in (False, True)
    )
    assert sum(len(site.layers) for site in plain.sites) == len(plain.layers)
    assert [site.site for site in plain.sites] == list(dict.fromkeys(x.site for x in plain.layers))
    one, other = plain.sites[0].diagonal, ordered.sites[0].diagonal
    assert len(one) == len(other) == 32
    assert other == sorted(other, reverse=True) and one != other
    assert sum(one) == pytest.approx(sum(other), rel=1e-3)


def test_times_lie_beside_the_record(llama, tmp_path):
    _, folder = llama
    result = run(folder, tmp_path / "out", RTN(4, 32), False)
    times = Times.model_validate_json((tmp_path / "out" / TIMES).read_text())
    assert times.model == str(folder) and times.device == "cpu" and times.calib == "token ids"
    assert times.seconds.keys() == result.seconds.keys() and times.seconds["total"] > 0
    assert times.layers == {layer.name: layer.seconds for layer in result.layers}
    said = (tmp_path / "out" / FILE).read_text()
    assert str(folder) not in said and "seconds" not in said


def test_the_published_schema():
    """A change of the record is written there too: the dump of what is compared."""
    assert json.loads((DOCS / "optq.schema.json").read_text()) == RunRecord.model_json_schema()
