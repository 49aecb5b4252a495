"""A quantized checkpoint is known by what is in it, wherever its settings are."""

import json
import shutil

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from optq import RTN, ModelConfig, Runner
from optq.errors import ModelError
from optq.formats import FORMATS, detect, reader, require_plain
from optq.formats.describe import describe
from optq.formats.export import export
from optq.formats.gguf import export_gguf
from optq.formats.gptq import GPTQ_V1, GPTQ_V2
from optq.model.checkpoint import Checkpoint

BY_NAME = {row.name: row for row in (*zoo.ROWS, *zoo.MULTIMODAL)}
LAYER = "model.layers.1.mlp.up_proj"
SETTINGS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture
def model(tmp_path):
    return zoo.save(BY_NAME["llama"], tmp_path / "model")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detect")
    config = ModelConfig(str(zoo.save(BY_NAME["llama"], folder / "model")), device="cpu")
    Runner(config, RTN(4, 32), calib=zoo.token_ids(2, 16), output=folder / "out").run()
    return folder / "out"


@pytest.fixture
def quantized(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def change(folder, **tensors):
    """Add tensors; names have two underscores for a dot."""
    path = folder / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file(state, path, metadata={"format": "pt"})
    return Checkpoint.open(str(folder))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def says(checkpoint, target):
    """What every way in says of a checkpoint that must be refused: the same.

    But for what to give instead: other quantized models are nothing to quantize.
    """
    said, quantizes = set(), set()
    for way in (
        detect,
        require_plain,
        describe,
        reader.load_checkpoint,
        reader.quantized_layers,
        lambda c: export(c, target / "out", GPTQ_V2),
        lambda c: export_gguf(c, target / "out.gguf"),
        lambda c: Runner(ModelConfig(str(c.folder)), RTN(4, 32), calib=zoo.token_ids()).run(),
    ):
        with pytest.raises(ModelError) as caught:
            way(checkpoint)
        only_plain = "dequantize=True" in caught.value.remedy
        (quantizes if only_plain else said).add((caught.value.cause, caught.value.remedy))
    ((cause, remedy),), ((same, plain),) = said, quantizes
    assert cause == same and "plain model, or one in gptq" in remedy
    assert "plain model" in plain and "gptq" not in plain and "bfloat16" in plain
    return cause


WEIGHT = LAYER.replace(".", "__") + "__weight"
CODES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_weights_that_are_codes(model, tmp_path, dtype):
    weight = load_file(model / "model.safetensors")[f"{LAYER}.weight"]
    checkpoint = change(model, **{WEIGHT: (weight * 40).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    assert f"{LAYER}.weight ({name}) is of a quantized model" in says(checkpoint, tmp_path)


@pytest.mark.parametrize(
    "part",
    ["weight_scale", "weight_scale_inv", "input_scale", "scale_weight", "qweight", "weight_packed"],
)
def test_parts_of_codes_beside_plain_weights(model, tmp_path, part):
    more = torch.ones(4, 4, dtype=torch.int32) if part in ("qweight", "weight_packed") else None
    tensor = torch.ones(1) if more is None else more
    checkpoint = change(model, **{f"{LAYER.replace('.', '__')}__{part}": tensor})
    assert f"{LAYER}.{part} (" in says(checkpoint, tmp_path)


def test_fp8_with_the_settings_of_another_program(model, tmp_path):
    weight = load_file(model / "model.safetensors")[f"{LAYER}.weight"]
    (model / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    reader.load_checkpoint(
        Checkpoint.open(str(model))
    )  # a file left over beside plain weights says nothing
    checkpoint = change(model, **{WEIGHT: weight.to(torch.float8_e4m3fn)})
    assert "quantized with ModelOpt, says its hf_quant_config.json" in says(checkpoint, tmp_path)


def test_the_settings_of_awq(quantized, tmp_path):
    change_config(quantized, quantization_config=None)
    (quantized / "quantize_config.json").unlink()
    (quantized / "quant_config.json").write_text('{"zero_point": true, "w_bit": 4}')
    checkpoint = Checkpoint.open(str(quantized))
    assert "quantized with AutoAWQ, says its quant_config.json" in says(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"compression_config": SETTINGS}, "compression_config"),
        ({"text_config": {"quantization_config": SETTINGS}}, "text_config.quantization_config"),
    ],
)
def test_settings_where_nobody_looks(model, tmp_path, changes, place):
    change_config(model, **changes)
    checkpoint = Checkpoint.open(str(model))
    assert says(checkpoint, tmp_path) == f"the model is quantized, says config.json in {place}"


def test_codes_beside_those_that_the_config_explains(quantized):
    """Dense layers of a gptq checkpoint in FP8."""
    name, state = "model.embed_tokens.weight", load_file(quantized / "model.safetensors")
    codes = state[name].to(torch.float8_e4m3fn)
    checkpoint = change(quantized, model__embed_tokens__weight=codes)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight \(float8_e4m3fn\) is of"):
        reader.load_checkpoint(checkpoint)


def test_buffers_are_no_codes(tmp_path):
    """Masks and positions, as old checkpoints hold them."""
    model = zoo.save(BY_NAME["gpt2"], tmp_path / "gpt2")
    before = dict(reader.load_checkpoint(Checkpoint.open(str(model))).state_dict())
    block = "transformer__h__0__attn__"
    checkpoint = change(
        model,
        **{
            f"{block}bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8),
            f"{block}masked_bias": torch.tensor(-10000),
            f"{block}mask": torch.ones(32, 32, dtype=torch.bool),
            "transformer__position_ids": torch.arange(32)[None],
            "transformer__relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
            "transformer__logit_scale": torch.tensor(2.0),
            "transformer__scale_table": torch.ones(4, 4),
            "transformer__ln_f__scale": torch.ones(64),
        },
    )
    assert detect(checkpoint) is None
    require_plain(checkpoint)
    after = dict(reader.load_checkpoint(checkpoint).state_dict())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("row", zoo.ROWS + zoo.MULTIMODAL, ids=lambda row: row.name)
def test_plain_models_are_plain(tmp_path, row):
    assert detect(Checkpoint.open(str(zoo.save(row, tmp_path)))) is None


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g", "model-4bit-128g", "model"])
@pytest.mark.parametrize("sharded", [True, False])
def test_the_first_layout_of_autogptq(quantized, tmp_path, name, sharded):
    """Settings in quantize_config.json alone, without a method, and a file named after them."""
    before = reader.load_checkpoint(Checkpoint.open(str(quantized)))
    change_config(quantized, quantization_config=None)
    settings = {"bits": 4, "group_size": 32, "damp_percent": 0.02, "desc_act": False, "sym": True}
    (quantized / "quantize_config.json").write_text(json.dumps(settings))
    state = load_file(quantized / "model.safetensors")
    (quantized / "model.safetensors").unlink()
    files = {f"{name}.safetensors": state}
    if sharded:
        names = sorted(state)
        halves = (names[:20], names[20:])
        files = {
            f"{name}-0000{i + 1}-of-00002.safetensors": {n: state[n] for n in half}
            for i, half in enumerate(halves)
        }
        where = {n: file for file, tensors in files.items() for n in tensors}
        index = json.dumps({"weight_map": where})
        (quantized / f"{name}.safetensors.index.json").write_text(index)
    for file, tensors in files.items():
        save_file(tensors, quantized / file)
    checkpoint = Checkpoint.open(str(quantized))
    after = reader.load_checkpoint(checkpoint)
    with torch.no_grad():
        ids = zoo.token_ids()
        assert torch.equal(after(ids).logits, before(ids).logits)
    what = describe(checkpoint)
    assert (what["format"], what["bits"], what["group_size"]) == ("gptq", 4, 32)
    with pytest.raises(ModelError, match="is quantized already"):
        require_plain(checkpoint)
    export(checkpoint, tmp_path / "there", GPTQ_V1)
    there = Checkpoint.open(str(tmp_path / "there"))
    assert detect(there).form == GPTQ_V1
    written = there.config()["quantization_config"]
    assert written["damp_percent"] == 0.02 and written["quant_method"] == "gptq"


def test_settings_of_their_own_beside_plain_weights_say_nothing(model):
    (model / "quantize_config.json").write_text('{"bits": 4}')
    assert detect(Checkpoint.open(str(model))) is None


def test_settings_of_their_own_that_are_not_json(quantized):
    change_config(quantized, quantization_config=None)
    (quantized / "quantize_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"quantize_config\.json is not JSON"):
        detect(Checkpoint.open(str(quantized)))


def test_the_dtype_of_a_config_that_does_not_say_it(tmp_path):
    """One answer for those that load the model and those that do not."""
    source = zoo.save(BY_NAME["llama_bfloat16"], tmp_path / "source")
    change_config(source, dtype=None, torch_dtype=None)
    config = ModelConfig(str(source), device="cpu")
    Runner(config, RTN(4, 32), calib=zoo.token_ids(2, 16), output=tmp_path / "out").run()
    checkpoint = Checkpoint.open(str(tmp_path / "out"))
    assert reader.load_checkpoint(checkpoint).dtype == torch.bfloat16
    export(checkpoint, tmp_path / "there", FORMATS["compressed-tensors"])
    there = Checkpoint.open(str(tmp_path / "there"))
    dtypes = {t.dtype for n, t in there.layout.items() if n.endswith("weight_scale")}
    assert dtypes == {torch.bfloat16}
