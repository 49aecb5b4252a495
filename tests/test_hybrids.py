"""Mamba blocks beside attention, without experts: what the model calls as a layer is quantized.

The kernels of mamba-ssm take a weight as it is (``out_proj.weight``) while a model is trained, and
only then: a model in evaluation mode calls the layer, on a CPU and on a GPU. A packed layer's
``weight`` is what its codes stand for, so whoever reads it all the same reads the right one.
"""

import json

import pytest
import torch
import zoo
from safetensors.torch import load_file
from test_experts import CALIB, build, logits
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from optq import GPTQ, ModelConfig, Runner, load
from optq.model.blocks import find_blocks
from optq.model.linear import QuantizedLinear, make_dense

# Layers that stay dense: Jamba multiplies with dt_proj.weight itself.
HYBRIDS = {"bamba": set(), "falcon_h1": set(), "granite_hybrid": set(), "jamba": {"dt_proj"}}


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_are_packed_or_dense_and_declared(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    config = ModelConfig(str(tmp_path / "model"), "cpu")
    options = {"calib": CALIB, "qep": True, "format": "compressed-tensors"}
    plain = Runner(config, GPTQ(4, 32), **options).run()
    run = Runner(config, GPTQ(4, 32), **options, output=tmp_path / "out").run()
    assert {each.rpartition(".")[2] for each in run.dense} == HYBRIDS[name]
    every = {each for block in find_blocks(model) for each in block.linears}
    assert {layer.name for layer in run.layers} | {*run.dense} == every
    assert any(layer.name.endswith("mamba.out_proj") for layer in run.layers)
    packed = load(tmp_path / "out", "cpu")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {*run.dense} <= {*settings["ignore"]} and run.record.dense == run.dense
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(f"{each}.weight" in state for each in run.dense)
    wanted = logits(plain.model)
    assert (logits(packed) - wanted).norm() < 0.05 * wanted.norm()
    for layer in (each for each in run.layers if ".experts." not in each.name):
        read = packed.get_submodule(layer.name)
        assert isinstance(read, QuantizedLinear)
        torch.testing.assert_close(read.weight, plain.model.get_submodule(layer.name).weight)
    prompt, most = zoo.token_ids(1, 8), {"max_new_tokens": 6, "do_sample": False}
    make_dense(packed)
    assert torch.equal(packed.generate(prompt, **most), plain.model.generate(prompt, **most))

    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)
