"""The same codes in another format, or a reason why not."""

import json
from pathlib import Path

import pytest
import torch
import zoo
from core.checks import solved
from safetensors.torch import load_file, save_file

from optq import GPTQ, RTN, ModelConfig, Runner
from optq.errors import ModelError, OutputError, SettingError
from optq.formats import FORMATS, reader
from optq.formats.export import export
from optq.formats.gguf import export_gguf
from optq.model.checkpoint import Checkpoint

BY_NAME = {row.name: row for row in zoo.ROWS}
CALIB = zoo.token_ids(4, 24)
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def made(tmp_path):
    """Quantize one of the table's tiny models, and open the result."""

    def make(name, quantizer, form="gptq", **options):
        source = zoo.save(BY_NAME[name], tmp_path / "source")
        out = tmp_path / "quantized"
        config = ModelConfig(str(source), device="cpu")
        Runner(config, quantizer, calib=CALIB, format=form, output=out, **options).run()
        return Checkpoint.open(str(out))

    return make


def layers(folder):
    checkpoint = Checkpoint.open(str(folder))
    return {n: reader.read_layer(checkpoint, n) for n in reader.quantized_layers(checkpoint)}


def same(one, other):
    assert one.keys() == other.keys() != set()
    for name, weight in one.items():
        assert other[name].wbits == weight.wbits
        for part in ("codes", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(other[name], part), getattr(weight, part)), (name, part)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_codes_and_grids_stay(made, tmp_path, source, target, bits, sym):
    if source != "gptq" and target == "gptq" and not sym:
        pytest.skip("may have zero points of 0, which version 1 cannot hold: tested below")
    checkpoint = made("qwen2", RTN(bits, 32, sym), source, skip=r"0\.mlp\.up")
    count = export(checkpoint, tmp_path / "there", FORMATS[target])
    assert count == len(reader.quantized_layers(checkpoint))
    same(layers(checkpoint.folder), layers(tmp_path / "there"))
    with torch.no_grad():
        one, other = (
            reader.load_checkpoint(Checkpoint.open(str(folder)))(zoo.token_ids()).logits
            for folder in (checkpoint.folder, tmp_path / "there")
        )
    assert torch.equal(one, other)
    config = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]
    if target == "compressed-tensors":
        assert "model.layers.0.mlp.up_proj" in config["ignore"] and "lm_head" in config["ignore"]
        assert not (tmp_path / "there" / "quantize_config.json").exists()
    else:
        assert list(config["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.up_proj$"]
        assert config["checkpoint_format"] == target


def test_a_zero_point_of_0_is_refused_by_version_1(made, tmp_path, monkeypatch):
    save = zoo.save

    def positive(row, folder):
        state = load_file(save(row, folder) / "model.safetensors")
        state["model.layers.0.mlp.up_proj.weight"].abs_()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    monkeypatch.setattr(zoo, "save", positive)
    checkpoint = made("llama", RTN(2, 32, sym=False), "gptq_v2")
    assert any((weight.zeros == 0).any() for weight in layers(checkpoint.folder).values())
    with pytest.raises(SettingError, match="gptq cannot hold a zero point of 0"):
        export(checkpoint, tmp_path / "there", FORMATS["gptq"])
    assert not (tmp_path / "there").exists()


def test_act_order_groups_are_refused_where_there_is_no_g_idx(made, tmp_path):
    checkpoint = made("llama", GPTQ.plain(4, 32, actorder=True))
    with pytest.raises(SettingError, match="would follow act-order"):
        export(checkpoint, tmp_path / "there", FORMATS["compressed-tensors"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized", "source"]
    export(checkpoint, tmp_path / "there", FORMATS["gptq_v2"])
    same(layers(checkpoint.folder), layers(tmp_path / "there"))


def test_conv1d_is_refused_where_readers_do_not_know_it(made, tmp_path):
    checkpoint = made("gpt2", RTN(4, 32))
    with pytest.raises(SettingError, match="is a Conv1D"):
        export(checkpoint, tmp_path / "there", FORMATS["compressed-tensors"])
    with pytest.raises(SettingError, match="is a Conv1D"):
        Runner(
            ModelConfig(str(tmp_path / "source"), "cpu"),
            RTN(4, 32),
            calib=CALIB,
            format="compressed-tensors",
        ).run()


def test_an_export_onto_itself_is_refused(made):
    checkpoint = made("llama", RTN(4, 32))
    before = {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()}
    with pytest.raises(OutputError, match="holds the model itself"):
        export(checkpoint, checkpoint.folder, FORMATS["gptq_v2"], force=True)
    with pytest.raises(OutputError):
        export_gguf(checkpoint, checkpoint.folder, force=True)
    assert {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()} == before


def test_a_plain_model_is_refused(tmp_path):
    source = zoo.save(BY_NAME["llama"], tmp_path / "source")
    with pytest.raises(ModelError, match="is not quantized"):
        export(Checkpoint.open(str(source)), tmp_path / "there", FORMATS["gptq"])


def test_linears_outside_the_blocks_are_ignored_by_name(made, tmp_path):
    """Readers give every other one packed tensors."""
    checkpoint = made("opt_350m", RTN(4, 32), "compressed-tensors")
    config = checkpoint.config()["quantization_config"]
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= set(config["ignore"])


def test_scales_that_the_model_s_dtype_cannot_hold_are_refused(tmp_path):
    """As another tool wrote them: float16 scales of a bfloat16 model, which readers would round."""
    checkpoint = Checkpoint.open(str(FIXTURES / "gptqmodel" / "gptq_4bit"))
    weights = layers(checkpoint.folder).values()
    assert any(not torch.equal(w.scales.bfloat16().float(), w.scales) for w in weights)
    with pytest.raises(SettingError, match=r"keeps scales in torch\.bfloat16"):
        export(checkpoint, tmp_path / "there", FORMATS["compressed-tensors"])
    assert not (tmp_path / "there").exists()
    export(checkpoint, tmp_path / "there", FORMATS["gptq_v2"])
    same(layers(checkpoint.folder), layers(tmp_path / "there"))


@pytest.mark.parametrize("form", FORMATS)
def test_scales_are_in_the_model_s_dtype_or_float16(made, tmp_path, form):
    checkpoint = made("llama_bfloat16", RTN(4, 32))
    export(checkpoint, tmp_path / "there", FORMATS[form])
    there = Checkpoint.open(str(tmp_path / "there"))
    dtypes = {t.dtype for name, t in there.tensors() if name.endswith(("scales", "weight_scale"))}
    wanted = torch.bfloat16 if form == "compressed-tensors" else torch.float16
    assert dtypes == {wanted}


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_head(made, tmp_path, form):
    """As GPTQModel can make one: the config must not deny it."""
    folder = made("llama", RTN(4, 32)).folder
    state = load_file(folder / "model.safetensors")
    head = state.pop("lm_head.weight").float()
    solution = solved(
        RTN(4, 32), head, torch.eye(head.shape[1]), FORMATS["gptq"].storage(head.dtype)
    )
    parts = FORMATS["gptq"].encode(solution, head.dtype, True)
    state |= {f"lm_head.{suffix}": tensor for suffix, tensor in parts.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(str(folder))
    export(checkpoint, tmp_path / "there", FORMATS[form])
    same(layers(folder), layers(tmp_path / "there"))
    assert torch.equal(reader.load_checkpoint(checkpoint).lm_head.weight, solution.weight)
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    if form == "compressed-tensors":
        assert "lm_head" not in config["quantization_config"]["ignore"]
    else:
        assert config["quantization_config"]["lm_head"] is True
    config["tie_word_embeddings"] = True  # which the file is not
    (tmp_path / "there" / "config.json").write_text(json.dumps(config))
    again = reader.load_checkpoint(Checkpoint.open(str(tmp_path / "there")))
    assert torch.equal(again.lm_head.weight, solution.weight)
