"""Settings and files that would leave a block's experts half quantized are refused by name."""

import re

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_experts import CALIB, build

from optq import GPTQ, RTN, ModelConfig, Runner, load
from optq.errors import ModelError, SettingError

# What transformers concatenates while it loads; what it does not, of three layouts.
NAMES = ["mixtral", "qwen2_moe", "granite_moe", "gpt_oss", "llama4"]
LACKING = {
    "mixtral": ("layers.0.block_sparse_moe.experts.2.w1.weight", r"experts\.2\.gate_proj"),
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
