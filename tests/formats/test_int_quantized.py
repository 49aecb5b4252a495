"""int-quantized: weights and activations in 8 bits, in the package itself and in transformers."""

import json
from dataclasses import replace

import pytest
import torch
import zoo
import zoo_configs
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from core import checks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optq import ModelConfig, Runner, SmoothQuant, load
from optq.core.rtn import RTN
from optq.core.weight import LayerScheme
from optq.errors import ModelError, SettingError
from optq.formats import FORMATS, detect, form_of
from optq.formats.config_groups import INTEGERS
from optq.formats.export import export
from optq.formats.int_quantized import INT_QUANTIZED as FORM
from optq.formats.readers import who_loads
from optq.kernels.int8_tokens import Int8TokensProduct
from optq.model.checkpoint import Checkpoint
from optq.model.linear import QuantizedLinear

W8A8 = LayerScheme(8, -1, True, abits=8)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
ROW = zoo.Row("wide", lambda: zoo_configs.llama(**SIZES), "model.layers", ())


def solved(dtype):
    return checks.solved(RTN(8), torch.randn(36, 75), torch.eye(75), FORM.storage(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip(dtype):
    solution = solved(dtype)
    tensors = FORM.encode(solution, dtype, True)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        "weight": (torch.int8, (36, 75)),
        "weight_scale": (dtype, (36, 1)),
    }
    meta = FORM.layout(36, 75, W8A8, dtype)
    assert {n: (t.dtype, t.shape) for n, t in meta.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    expected = tensors["weight_scale"].double() * tensors["weight"].double()
    assert torch.equal(expected.float(), solution.weight)
    own = FORM.decode("X", tensors, W8A8)
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(own, part), getattr(solution, part)), part
    group = FORM.config({"X": W8A8}, [], 0.01)["config_groups"]["group_0"]
    package = BaseCompressor.get_value_from_registry(INTEGERS).decompress(
        tensors, QuantizationScheme(**group)
    )["weight"]
    assert torch.equal(package, solution.weight.to(dtype))


def test_config():
    config = FORM.config({"layers.0.X": W8A8}, ["layers.0.Y"], 0.01)
    assert config["format"] == "int-quantized" and config["ignore"] == ["layers.0.Y", "lm_head"]
    (group,) = config["config_groups"].values()
    assert group["weights"]["strategy"] == "channel" and group["weights"]["group_size"] is None
    activations = group["input_activations"]
    assert (activations["strategy"], activations["dynamic"]) == ("token", True)
    read = QuantizationConfig(**config)
    assert read.config_groups["group_0"].input_activations.num_bits == 8
    found = FORM.detect(json.loads(json.dumps(config)))
    assert found.layer("layers.0.X") == W8A8 and found.layer("layers.0.Y") is None
    assert FORMATS["compressed-tensors"].detect(config) is None
    assert (
        FORM.detect(FORMATS["compressed-tensors"].config({"X": LayerScheme(8, -1, True)}, [], 0))
        is None
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_bits": 4},
        {"type": "float"},
        {"symmetric": False},
        {"strategy": "tensor"},
        {"dynamic": False},
        {"dynamic": "local"},
    ],
)
def test_other_activations_are_refused(changes):
    config = FORM.config({"X": W8A8}, [], 0.01)
    config["config_groups"]["group_0"]["input_activations"] |= changes
    with pytest.raises(ModelError, match="input activations in another way than by token in 8"):
        FORM.detect(config)


def test_what_it_cannot_hold():
    for scheme in (replace(W8A8, wbits=4), replace(W8A8, groupsize=32), replace(W8A8, abits=None)):
        with pytest.raises(SettingError, match="int-quantized keeps weights and activations of 8"):
            FORM.check("X", 64, 64, scheme)
    with pytest.raises(SettingError, match="X is a Conv1D"):
        FORM.check("X", 64, 64, W8A8, conv1d=True)
    for name in ("gptq", "gptq_v2"):
        assert form_of(name, W8A8) is FORMATS[name]
        with pytest.raises(SettingError, match=f"{name} says nothing of activations"):
            FORMATS[name].check("X", 64, 64, W8A8)
    assert form_of(None, W8A8) is form_of("compressed-tensors", W8A8) is FORM
    assert form_of(None, LayerScheme(8, -1, True)) is FORMATS["gptq"]
    tensors = FORM.encode(solved(torch.float32), torch.float32, True)
    for changes, message in (
        ({"weight": tensors["weight"].int()}, "no codes of 8 bits"),
        ({"weight_scale": torch.ones(35, 1)}, "weight_scale is"),
    ):
        with pytest.raises(ModelError, match=message):
            FORM.decode("X", tensors | changes, W8A8)
    with pytest.raises(ModelError, match="which its config denies"):
        FORM.decode("X", tensors, replace(W8A8, wbits=4))


@pytest.mark.parametrize("alpha", [None, "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_reads_what_we_write(tmp_path, dtype, alpha):
    """The same weights, norms included, and equal logits: of the same rounded activations."""
    row = replace(ROW, dtype=dtype)
    source = zoo.save(row, tmp_path / "source")
    config = ModelConfig(str(source), device="cpu")
    result = Runner(config, SmoothQuant(alpha=alpha), calib=zoo.token_ids(4, 24)).run()
    result.save(tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=dtype
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = zoo.token_ids()
    ours = load(tmp_path / "out", device="cpu")
    plain = config.load()[0]
    with torch.no_grad():
        one, kept, packed, full = (
            m(ids).logits.double() for m in (theirs, result.model, ours, plain)
        )
    for name, parameter in result.model.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter), name
    # In bfloat16 the package rounds each step, the scales of tokens too, where we use float32.
    exact, far = dtype == torch.float32, (one - full).norm() / one.norm()
    assert torch.equal(one, kept) if exact else (one - kept).norm() <= 0.05 * one.norm()
    # A token's largest value is half way between two codes: last bits of the product of integers
    # decide that otherwise than those of the rounded floats. On average it is the same.
    assert (packed - kept).norm() <= 0.05 * one.norm()
    assert 0.3 < (packed - full).norm() / (kept - full).norm() < 3
    assert 1e-3 < far < 0.1
    layers = [m for m in ours.modules() if type(m) is QuantizedLinear]
    assert layers and all(type(m.product) is Int8TokensProduct for m in layers)
    loads = [reader.loads for reader in who_loads(Checkpoint.open(str(tmp_path / "out")))]
    assert loads[:3] == [True, True, True]


def test_norms_are_written_and_the_rest_is_as_it_was(tmp_path):
    source = zoo.save(ROW, tmp_path / "source")
    config, out = ModelConfig(str(source), device="cpu"), tmp_path / "out"
    result = Runner(config, SmoothQuant(alpha=0.5), calib=zoo.token_ids(4, 24), output=out).run()
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    smoothed = {
        f"model.layers.{i}.{n}_layernorm.weight"
        for i in (0, 1)
        for n in ("input", "post_attention")
    }
    for name, tensor in before.items():
        if name in smoothed:
            assert not torch.equal(tensor, after[name])
        elif after[name].dtype != torch.int8:
            assert torch.equal(tensor, after[name]), name
    quantized = sum(tensor.numel() for tensor in after.values() if tensor.dtype == torch.int8)
    assert quantized == sum(layer.rows * layer.cols for layer in result.layers)
    with pytest.raises(SettingError, match="gptq says nothing of activations"):
        export(Checkpoint.open(str(out)), tmp_path / "there", FORMATS["gptq"])
    assert detect(Checkpoint.open(str(out))).form is FORM
