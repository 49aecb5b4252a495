"""The gptq format, both versions: what is encoded decodes the same, here and independently."""

import json
import re

import decoder
import numpy as np
import pytest
import torch
from core.checks import solved

from optq.core.gptq import GPTQ
from optq.core.grid import Storage
from optq.core.rtn import RTN
from optq.core.weight import LayerScheme
from optq.errors import ModelError, SettingError
from optq.formats import detect
from optq.formats.gptq import GPTQ_V1, GPTQ_V2
from optq.model.checkpoint import Checkpoint

VERSIONS = pytest.mark.parametrize(
    ("form", "version"), [(GPTQ_V1, 1), (GPTQ_V2, 2)], ids=["v1", "v2"]
)
ROWS, COLUMNS = 64, 96
SUFFIXES = {"qweight", "qzeros", "scales", "g_idx"}


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight[: ROWS // 4] += 3  # groups of one sign: zero points at both ends
    weight[ROWS // 4 : ROWS // 2] -= 3
    inputs = torch.randn(4 * COLUMNS, COLUMNS, generator=generator)
    inputs *= torch.linspace(0.1, 3, COLUMNS)[torch.randperm(COLUMNS, generator=generator)]
    return weight, inputs.T @ inputs / len(inputs)


def arrays(tensors):
    return [tensors[part].numpy() for part in decoder.PARTS]


@VERSIONS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", ["plain", "act-order", "static"])
@pytest.mark.parametrize("groupsize", [-1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(form, version, bits, sym, order, groupsize, dtype):
    weight, H = problem()
    quantizer = GPTQ.plain(bits, groupsize, sym, order != "plain", static_groups=order == "static")
    solution = solved(quantizer, weight, H, form.storage(dtype))
    tensors = form.encode(solution, dtype, sym)

    groups = 1 if groupsize == -1 else COLUMNS // groupsize
    shapes = {
        "qweight": (torch.int32, (COLUMNS * bits // 32, ROWS)),
        "qzeros": (torch.int32, (groups, ROWS * bits // 32)),
        "scales": (torch.float16, (groups, ROWS)),
        "g_idx": (torch.int32, (COLUMNS,)),
    }
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == shapes
    assert all(tensor.is_contiguous() for tensor in tensors.values())

    scheme = quantizer.scheme()
    own = form.decode("X", tensors, scheme)
    assert torch.equal(own.codes, solution.codes)
    assert torch.equal(own.zeros, solution.zeros)
    assert torch.equal(own.scales, solution.scales)
    assert torch.equal(own.g_idx, solution.g_idx)
    assert torch.equal(own.weight, solution.weight)

    other = decoder.decode_layer(*arrays(tensors), bits, version)
    np.testing.assert_array_equal(other.codes, solution.codes.numpy())
    np.testing.assert_array_equal(other.zeros, solution.zeros.numpy())
    # A step times a small integer: exact in float64, and nearly always in float32.
    np.testing.assert_array_equal(other.weight.astype(np.float32), solution.weight.numpy())
    np.testing.assert_array_equal(
        own.weight.to(dtype).double().numpy(),
        torch.from_numpy(other.weight).float().to(dtype).double().numpy(),
    )
    in_order = np.arange(COLUMNS) // (COLUMNS if groupsize == -1 else groupsize)
    monotone = np.array_equal(other.g_idx, in_order)
    assert scheme.actorder == (not monotone)
    assert form.config({"layers.0.a": scheme}, [], 0.01)["desc_act"] == (not monotone)
    if dtype == torch.bfloat16:
        scales = tensors["scales"].float()
        assert torch.equal(scales.bfloat16().float(), scales)


@pytest.mark.parametrize(("bits", "word"), [(2, 1), (3, 3), (4, 7), (8, 127)])
def test_symmetric_zero_points_of_version_1(bits, word):
    weight, H = problem()
    tensors = GPTQ_V1.encode(
        solved(RTN(bits, 32), weight, H, GPTQ_V1.storage(torch.float32)), torch.float32, True
    )
    fields = decoder.stream_values(tensors["qzeros"].numpy(), bits)
    assert (fields == word).all()
    if bits == 4:
        assert (tensors["qzeros"] == 0x77777777).all()


def test_version_1_keeps_zero_points_that_it_can_hold():
    weight, H = problem()
    for form, least in ((GPTQ_V1, 1), (GPTQ_V2, 0)):
        storage = form.storage(torch.float32)
        assert storage.min_zero == least
        zeros = solved(RTN(4, 32, sym=False), weight, H, storage).zeros
        assert zeros.min() == least


def test_version_1_refuses_a_zero_point_of_0():
    weight, H = problem()
    solution = solved(RTN(4, 32, sym=False), weight, H, Storage())
    assert solution.zeros.min() == 0
    with pytest.raises(SettingError, match="gptq cannot hold a zero point of 0"):
        GPTQ_V1.encode(solution, torch.float32, False)
    tensors = GPTQ_V2.encode(solution, torch.float32, False)
    back = GPTQ_V2.decode("X", tensors, LayerScheme(4, 32, sym=False))
    assert torch.equal(back.zeros, solution.zeros)


@pytest.mark.parametrize(
    ("shape", "bits", "groupsize", "message"),
    [
        ((64, 96), 4, 64, "groupsize 64 does not divide the 96 columns of X"),
        ((64, 96), 4, 128, "groupsize 128 does not divide the 96 columns of X"),
        ((64, 36), 4, -1, "36 columns do not fill 32-bit words"),
        ((36, 64), 4, -1, "36 rows do not fill 32-bit words"),
        ((64, 72), 3, 24, "72 columns do not fill 32-bit words"),
        ((64, 104), 8, 52, None),
        ((64, 96), 3, 32, None),
        ((64, 96), 2, -1, None),
    ],
)
def test_shapes_that_cannot_be_written_are_refused(shape, bits, groupsize, message):
    if message is None:
        return GPTQ_V1.check("X", *shape, LayerScheme(bits, groupsize, True))
    with pytest.raises(SettingError, match=message):
        GPTQ_V1.check("X", *shape, LayerScheme(bits, groupsize, True))


KEYS = {
    "bits",
    "group_size",
    "desc_act",
    "sym",
    "lm_head",
    "quant_method",
    "checkpoint_format",
    "pack_dtype",
    "damp_percent",
    "true_sequential",
    "meta",
}


def declared(folder, settings):
    """What is read of a config with these settings."""
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return detect(Checkpoint(folder, {}, {}))


@VERSIONS
def test_config_of_a_whole_model(form, version, tmp_path):
    config = form.config({"model.layers.0.mlp.up_proj": LayerScheme(4, 128, True)}, [], 0.02)
    assert config.keys() == KEYS
    assert config["bits"] == 4 and config["group_size"] == 128 and config["sym"] is True
    assert config["quant_method"] == "gptq" and config["checkpoint_format"] == form.name
    assert config["damp_percent"] == 0.02 and config["pack_dtype"] == "int32"
    assert config["lm_head"] is False
    assert re.fullmatch(r"optq:\d+\.\d+\.\d+.*", config["meta"]["quantizer"][0])
    scheme = declared(tmp_path, config)
    assert scheme.form == form and scheme.layer("any") == LayerScheme(4, 128, True)


def test_layers_of_other_settings_have_rules(tmp_path):
    usual, other = LayerScheme(4, 128, True), LayerScheme(8, -1, False, actorder=True)
    layers = {f"model.layers.{i}.mlp.up_proj": usual for i in range(12)}
    layers["model.layers.1.mlp.up_proj"] = other
    config = GPTQ_V2.config(layers, ["model.layers.2.mlp.down_proj"], 0.01)
    assert config["bits"] == 4
    scheme = declared(tmp_path, config)
    assert {name: scheme.layer(name) for name in layers} == layers
    assert scheme.layer("model.layers.2.mlp.down_proj") is None


def test_rules_are_read_as_gptqmodel_reads_them(tmp_path):
    """The first that matches from the start of the name; without a sign it changes settings."""
    rules = {"-:.*k_proj": {}, r".*\.1\..*": {"bits": 8}, "+:model": {"group_size": 32}}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": rules}
    layer = declared(tmp_path, config).layer
    assert layer("model.layers.1.k_proj") is None
    assert layer("model.layers.1.q_proj") == LayerScheme(8, 128, True)
    assert layer("model.layers.0.q_proj") == LayerScheme(4, 32, True)
    assert layer("lm_head") == LayerScheme(4, 128, True)


@pytest.mark.parametrize(
    ("quantizer", "desc_act"),
    [
        (RTN(4, 32), False),
        (GPTQ.plain(4, 32), False),
        (GPTQ.plain(4, 32, actorder=True), True),
        (GPTQ.plain(4, 32, actorder=True, static_groups=True), False),
        (GPTQ.plain(4, -1, actorder=True), False),
        (GPTQ.plain(4, 32, static_groups=True), False),
    ],
    ids=str,
)
def test_desc_act_says_whether_g_idx_is_out_of_order(quantizer, desc_act):
    assert quantizer.scheme().actorder is desc_act


def test_dense_layers_are_named_twice():
    quantized = [f"model.layers.{i}.{n}" for i in range(12) for n in ("mlp.up_proj", "attn.q")]
    quantized.remove("model.layers.1.attn.q")
    dense = [f"model.layers.{i}.mlp.down_proj" for i in range(12)] + ["model.layers.1.attn.q"]
    config = GPTQ_V1.config(dict.fromkeys(quantized, LayerScheme(4, -1, True)), dense, 0.01)
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj"], ["attn.q"]]
    rules = config["dynamic"]
    assert all(rule.startswith("-:") and changes == {} for rule, changes in rules.items())
    for name in (*quantized, *dense):
        out = any(re.match(rule.removeprefix("-:"), name) for rule in rules)
        assert out == (name in dense), name


def test_layers_outside_have_one_rule_for_all_that_is_never_packed():
    """Readers fuse layers, and ask for names such as mtp.layers.0.mlp.gate_up_proj."""
    quantized = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 6)]
    outside = ["lm_head", "model.vision.0.fc1", "model.layers.61.mlp.up_proj", "mtp.fc"]
    outside += ["mtp.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj_2"]
    layers = dict.fromkeys(quantized, LayerScheme(4, -1, True))
    config = GPTQ_V1.config(layers, [], 0.01, outside)
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    assert list(config["dynamic"]) == [
        r"-:^model\.vision(\.|$)",
        r"-:^model\.layers\.61(\.|$)",
        r"-:^mtp(\.|$)",
        r"-:^model\.layers\.0\.mlp\.up_proj_2(\.|$)",
    ]
    for name in (*quantized, *outside[1:], "mtp.layers.0.mlp.gate_up_proj"):
        out = any(re.match(rule.removeprefix("-:"), name) for rule in config["dynamic"])
        assert out == (name not in quantized), name
    assert GPTQ_V1.config(layers, [], 0.01, ["lm_head"]).keys() == KEYS


def test_detect(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert detect(Checkpoint(tmp_path, {}, {})) is None
    assert declared(tmp_path, None) is None
    old = {"quant_method": "gptq", "bits": 4}  # before checkpoint_format existed
    scheme = declared(tmp_path, old)
    assert scheme.form == GPTQ_V1 and scheme.layer("any").wbits == 4
    for config, message in (
        ({"quant_method": "awq"}, "quantized with awq"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin is unknown"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "groups of 0"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "packed in int16"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {}}}, "no regular expression"),
        ({"load_in_4bit": True}, "quantized with bitsandbytes"),
        ({"bits": 4}, "an unnamed method"),
    ):
        with pytest.raises(ModelError, match=message):
            declared(tmp_path, config)


def test_mixed_widths_have_one_rule_each_that_matches_what_readers_fuse():
    """vLLM asks for ``qkv_proj``, ``gate_up_proj`` and all ``experts``, not for their parts."""
    widths = {"self_attn.q_proj": 4, "self_attn.k_proj": 4, "self_attn.v_proj": 4}
    widths |= {"self_attn.o_proj": 3, "mlp.gate_proj": 2, "mlp.up_proj": 2, "mlp.down_proj": 4}
    names = {f"model.layers.0.{name}": bits for name, bits in widths.items()}
    names |= {f"model.layers.1.self_attn.{part}_proj": 2 for part in "qkvo"}
    names |= {f"model.layers.10.self_attn.{part}_proj": 3 for part in "qkvo"}
    names |= {"model.layers.2.fc1": 4, "model.layers.2.fc2": 4, "model.layers.2.self_attn.q": 3}
    for part in ("gate", "up", "down"):
        names |= {f"model.layers.3.mlp.experts.{e}.{part}_proj": 2 for e in range(12)}
        names[f"model.layers.3.mlp.shared_expert.{part}_proj"] = 8
    layers = {name: LayerScheme(bits, 128, True) for name, bits in names.items()}
    config = GPTQ_V1.config(layers, ["model.layers.2.self_attn.dense"], 0.01)
    rules = config["dynamic"]
    assert config["bits"] == 2 and len(rules) == 4  # of 3, 4 and 8 bits; and of what is dense
    scheme = GPTQ_V1.detect(config)
    assert {name: scheme.layer(name).wbits for name in names} == names
    asked = {"0.self_attn.qkv_proj": 4, "0.mlp.gate_up_proj": 2, "1.self_attn.qkv_proj": 2}
    asked |= {"10.self_attn.qkv_proj": 3, "3.mlp.experts": 2, "3.mlp.shared_expert.gate_up_proj": 8}
    for name, bits in asked.items():
        assert scheme.layer(f"model.layers.{name}").wbits == bits, name
    assert scheme.layer("model.layers.2.self_attn.dense") is None


def test_a_rule_for_experts_and_what_stands_beside_them():
    layers = {f"model.layers.1.mlp.experts.{e}.up_proj": LayerScheme(3, 32, True) for e in (0, 1)}
    layers |= {"model.layers.1.mlp.latent": LayerScheme(3, 32, True)}
    layers |= {f"model.layers.{i}.self_attn.q_proj": LayerScheme(4, 32, True) for i in range(9)}
    detected = GPTQ_V1.detect(GPTQ_V1.config(layers, [], 0.01))
    assert {name: detected.layer(name) for name in layers} == layers
