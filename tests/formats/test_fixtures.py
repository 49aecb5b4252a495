"""Checkpoints of other tools, held against the weights and logits that those tools make of them.

``tests/fixtures/make_*.py`` made them and say with which versions. The weights are to be equal bit
for bit in the dtype of the other tool; OPTQ's own reader and kernels take no part in ``expected``.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optq import load
from optq.core.weight import LayerScheme
from optq.formats.reader import quantized_layers, read_layer
from optq.model.checkpoint import Checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FOUR = LayerScheme(4, 32, True)


def alike(scheme, **others):
    """The scheme of every layer, with those of some; None is a dense one."""
    return {name: others.get(name, scheme) for name in LINEARS}


THREE, EIGHT = LayerScheme(3, -1, False), LayerScheme(8, -1, True)
MIXED = {"o_proj": EIGHT, "gate_proj": THREE, "up_proj": THREE, "down_proj": THREE}

SCHEMES = {
    "compressed_tensors/act_order": {
        "up_proj": LayerScheme(4, 32, True, actorder=True),
        "down_proj": LayerScheme(4, 32, False, actorder=True),
    },
    "llmcompressor/w4a16_g32": alike(FOUR, v_proj=None),
    "llmcompressor/w4a16_g32_static": alike(FOUR),
    "llmcompressor/w4a16_asym_g32": alike(LayerScheme(4, 32, False)),
    "llmcompressor/w8a16_channel": alike(EIGHT),
    "llmcompressor/mixed": alike(LayerScheme(2, 16, True), **MIXED),
    "gptqmodel/gptq_4bit": alike(FOUR),
    "gptqmodel/gptq_4bit_desc_act": alike(LayerScheme(4, 32, True, actorder=True)),
    "gptqmodel/gptq_3bit_channel": alike(LayerScheme(3, -1, True)),
    "gptqmodel/gptq_8bit_qwen2": alike(LayerScheme(8, 32, True)),
    "gptqmodel/gptq_v2_4bit_asym": alike(LayerScheme(4, 32, False)),
    "gptqmodel/gptq_2bit_asym_desc_act": alike(LayerScheme(2, 32, False, actorder=True)),
    "gptqmodel/gptq_dynamic": alike(FOUR, v_proj=None, down_proj=EIGHT),
}
MODELS = [name for name in SCHEMES if name != "compressed_tensors/act_order"]
# Of logits up to 6: other kernels round in other places, at worst to bfloat16's 8 bits each time.
TOLERANCE = 0.2


def test_every_fixture_is_in_the_table():
    folders = {str(f.parent.relative_to(FIXTURES)) for f in FIXTURES.rglob("config.json")}
    assert folders == SCHEMES.keys()
    assert sum(file.stat().st_size for file in FIXTURES.rglob("*")) < 2**20


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_of_the_other_tool(name):
    checkpoint = Checkpoint.open(str(FIXTURES / name))
    expected = load_file(FIXTURES / name / "expected.safetensors")
    expected.pop("logits", None)
    layers = {disk.rpartition(".")[2]: disk for disk in quantized_layers(checkpoint)}
    assert layers.keys() == {short for short, scheme in SCHEMES[name].items() if scheme}
    assert len(expected) >= 2
    for disk, weight in expected.items():
        layer, scheme = read_layer(checkpoint, disk), SCHEMES[name][disk.rpartition(".")[2]]
        rows, columns = weight.shape
        groups = 1 if scheme.groupsize == -1 else columns // scheme.groupsize
        assert (layer.wbits, layer.rows, layer.cols) == (scheme.wbits, rows, columns)
        assert layer.groups == groups
        assert layer.sym == scheme.sym
        assert layer.consecutive != scheme.actorder
        assert torch.equal(layer.weight.to(weight.dtype), weight), disk


@pytest.mark.parametrize("name", MODELS)
def test_models_run_as_in_the_other_tool(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")["logits"]
    model = load(FIXTURES / name, device="cpu")
    with torch.no_grad():
        logits = model(torch.arange(16)[None]).logits
    assert expected.abs().max() > 20 * TOLERANCE
    torch.testing.assert_close(logits.float(), expected.float(), atol=TOLERANCE, rtol=0)
