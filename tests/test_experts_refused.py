"""Settings and files that would leave a block's experts half quantized are refused by name."""

import re

import pytest
import torch
import transformers
import zoo
import zoo_configs as configs
from safetensors.torch import load_file, save_file
from test_experts import CALIB, build, logits

from optq import GPTQ, RTN, ModelConfig, Runner, load
from optq.errors import ModelError, OutputError, SettingError
from optq.formats import FORMATS
from optq.formats.export import export
from optq.model.checkpoint import Checkpoint
from optq.model.linear import make_dense

# What transformers concatenates while it loads; what it does not, of three layouts.
NAMES = ["mixtral", "qwen2_moe", "granite_moe", "gpt_oss", "llama4"]
LACKING = {
    "mixtral": (
        "layers.0.block_sparse_moe.experts.2.w1.weight",
        r"block_sparse_moe\.experts\.2\.w1\.weight is missing",
    ),
    "qwen2_moe": ("layers.1.mlp.experts.3.up_proj.weight", r"experts\.3\.up_proj"),
    "granite_moe": ("layers.0.block_sparse_moe.input_linear.weight", r"experts\.gate_up_proj"),
    "gpt_oss": ("layers.1.mlp.experts.down_proj", r"experts\.down_proj"),
    "llama4": ("layers.1.feed_forward.experts.gate_up_proj", r"experts\.gate_up_proj"),
}


def saved(name, folder):
    build(name).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def quantize(folder, quantizer=None, **options):
    options = {"calib": CALIB, "format": "compressed-tensors"} | options
    return Runner(ModelConfig(str(folder), "cpu"), quantizer or RTN(4, 32), **options).run()


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_skipped_together_or_not_at_all(tmp_path, name):
    source, out = saved(name, tmp_path / "model"), tmp_path / "out"
    for one in (r"experts\.2\.", r"experts\.\d\.down_proj", r"layers\.1\..*experts\.0\.up"):
        with pytest.raises(SettingError, match=r"leaves some experts .* dense and others not"):
            quantize(source, skip=one, output=out)
    assert not out.exists()
    every = quantize(source)
    result = quantize(source, skip=r"layers\.1\.\w+\.experts", output=out)
    assert len(result.layers) == len(every.layers) - 12
    assert len(result.dense) == len(every.dense) + 12
    model, plain = load(out, "cpu"), build(name)
    (bank,) = (
        n
        for n, _ in plain.named_modules()
        if n.endswith("layers.1.mlp.experts")
        or re.search(r"layers\.1\.(block_sparse_moe|feed_forward)\.experts$", n)
    )
    for part in ("gate_up_proj", "down_proj"):
        expected = getattr(plain.get_submodule(bank), part)
        assert torch.equal(getattr(model.get_submodule(bank), part), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_fits_no_expert_is_refused_with_what_would_do(tmp_path, name):
    source, out = saved(name, tmp_path / "model"), tmp_path / "out"
    with pytest.raises(
        SettingError, match=r"groupsize 64 does not divide the 96 columns of .*experts"
    ) as caught:
        quantize(source, GPTQ(4, 64), output=out)
    assert not out.exists()
    assert "choose --groupsize 32 or 16 or -1" in caught.value.remedy
    skip = re.search("--skip '(.*)'", caught.value.remedy)[1]
    result = quantize(source, GPTQ(4, 64), skip=skip, output=out)
    assert not any(".experts." in layer.name for layer in result.layers)
    assert sum(".experts." in name for name in result.dense) == 24
    assert torch.isfinite(load(out, "cpu")(input_ids=CALIB[:1]).logits).all()


@pytest.mark.parametrize("name", LACKING)
def test_a_source_that_lacks_an_expert_is_refused_by_name(tmp_path, name):
    source, (lacking, said) = saved(name, tmp_path / "model"), LACKING[name]
    state = load_file(source / "model.safetensors")
    del state[f"model.{lacking}"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        quantize(source, output=tmp_path / "out")
    assert re.search(said, f"{caught.value.cause} {caught.value.remedy}")
    assert not (tmp_path / "out").exists()


def changed(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without(pattern):
    return lambda state: {n: t for n, t in state.items() if not re.search(pattern, n)}


QWEN = "model.layers.1.mlp.experts"
EXTRA = "is of an expert that the model does not have"
ODD = {  # one expert at odds with the others, and what is said of it
    "the last is gone": (without(r"1\.mlp\.experts\.3\."), f"{QWEN}.3.gate_proj.weight is missing"),
    "a down is gone": (without(r"1.*\.2\.down"), f"{QWEN}.2.down_proj.weight is missing"),
    "one too many": (
        lambda state: state | {f"{QWEN}.4.up_proj.weight": state[f"{QWEN}.3.up_proj.weight"] + 1},
        f"{QWEN}.4.up_proj.weight {EXTRA}",
    ),
    "one down too many": (
        lambda state: state | {f"{QWEN}.4.down_proj.weight": torch.ones(64, 96)},
        f"{QWEN}.4.down_proj.weight {EXTRA}",
    ),
    "another shape": (
        lambda state: state | {f"{QWEN}.2.up_proj.weight": torch.ones(95, 64)},
        f"{QWEN}.2.up_proj.weight is 95 x 64 where the model has 96 x 64",
    ),
    "another shape of a layer": (
        lambda state: state | {"model.layers.1.self_attn.q_proj.weight": torch.ones(63, 64)},
        "model.layers.1.self_attn.q_proj.weight is 63 x 64 where the model has 64 x 64",
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_source_with_an_odd_expert_is_refused_by_its_name_on_disk(tmp_path, odd):
    change, said = ODD[odd]
    source = changed(saved("qwen2_moe", tmp_path / "model"), change)
    with pytest.raises(ModelError) as caught:
        quantize(source)
    assert caught.value.cause.endswith(f"do not fit Qwen2MoeForCausalLM: {said}")


LACKS = {
    "experts": (
        r"layers\.1\..*experts\.2\.w3\.",
        r"model\.layers\.1\.block_sparse_moe\.experts\.2\.w3",
    ),
    "a block of them": (
        r"layers\.1\..*experts",
        r"model\.layers\.1\.block_sparse_moe\.experts\.0\.w1",
    ),
    "a router": (r"layers\.0\..*\.gate\.", r"model\.layers\.0\.block_sparse_moe\.gate"),
    "a layer": (r"layers\.0\..*k_proj", r"model\.layers\.0\.self_attn\.k_proj"),
    "a norm": (r"^model\.norm", r"model\.norm"),
}


@pytest.mark.parametrize("what", LACKS)
@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors"])
def test_an_export_of_what_is_not_whole_is_refused(tmp_path, what, form):
    gone, said = LACKS[what]
    quantize(saved("mixtral", tmp_path / "model"), output=tmp_path / "out")
    changed(tmp_path / "out", without(gone))
    with pytest.raises(ModelError, match=rf"lacks {said}\.weight"):
        export(Checkpoint.open(str(tmp_path / "out")), tmp_path / "again", FORMATS[form])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_an_export_that_is_refused_says_nothing_else(tmp_path):
    out, lines = tmp_path / "out", []
    quantize(saved("mixtral", tmp_path / "model"), output=out)
    for target in (out, tmp_path / "model"):
        with pytest.raises(OutputError):
            export(Checkpoint.open(str(out)), target, FORMATS["gptq"], notice=lines.append)
    assert lines == []


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_experts_that_transformers_transposes_while_it_loads(tmp_path, form):
    """All of a block in one tensor, with its axes in another order: Qwen3-VL's."""
    text = configs.qwen3_moe().to_dict()
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 64}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": []}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision | {"out_hidden_size": 64},
        architectures=["Qwen3VLMoeForConditionalGeneration"],
    )
    plain = zoo.Row("", lambda: config, "", (), auto_class="AutoModelForImageTextToText").build()
    source = tmp_path / "model"
    config.save_pretrained(source)
    zoo.tokenizer().save_pretrained(source)
    state = {
        name: (t.mT if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else t).clone()
        for name, t in plain.state_dict().items()
    }
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    expected = quantize(source, format=form)
    assert len(expected.layers) == 32
    quantize(source, format=form, output=tmp_path / "out")
    reloaded = load(tmp_path / "out", "cpu")
    make_dense(reloaded)
    wanted = logits(expected.model)
    torch.testing.assert_close(logits(reloaded), wanted, rtol=1e-5, atol=1e-5)
    assert 0 < (wanted - logits(plain)).norm() < 0.3 * wanted.norm()
    assert not any("gate_up_proj" in name for name in Checkpoint.open(str(tmp_path / "out")).files)
