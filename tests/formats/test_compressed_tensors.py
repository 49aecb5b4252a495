"""compressed-tensors: what we encode decodes the same here, in NumPy, and in the package itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
import zoo_configs
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match
from core import checks
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from optq import ModelConfig, Runner, load
from optq.core.gptq import GPTQ
from optq.core.grid import Storage
from optq.core.rtn import RTN
from optq.core.weight import LayerScheme, QuantizedWeight
from optq.errors import ModelError, SettingError
from optq.formats.compressed_tensors import COMPRESSED_TENSORS as FORM
from optq.formats.compressed_tensors import RELEASE
from optq.formats.config_groups import PACKED
from optq.model.linear import QuantizedLinear

BY_NAME = {row.name: row for row in zoo.ROWS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOUR_BITS = LayerScheme(4, 32, True)


def solved(quantizer, rows=36, columns=96, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[: rows // 3] += 3  # groups of one sign: zero points at both ends
    weight[rows // 3 : rows // 2] -= 3
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs *= torch.linspace(0.1, 3, columns)[torch.randperm(columns, generator=generator)]
    return checks.solved(quantizer, weight, inputs.T @ inputs / len(inputs), FORM.storage(dtype))


def fields(words, count, bits):
    """``[streams, count]`` out of int32 ``[streams, words]``, each row one bit stream."""
    stream = np.unpackbits(
        np.ascontiguousarray(words).astype("<i4").view(np.uint8), axis=1, bitorder="little"
    )
    assert not stream[:, count * bits :].any(), "the rest of the last word is not empty"
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (2 ** np.arange(bits))


def decoded_in_numpy(tensors, bits, groupsize):
    """The weights ``[N, K]`` in float64, from the description of the format alone."""
    rows, columns = tensors["weight_shape"].tolist()
    half = 2 ** (bits - 1)
    codes = fields(tensors["weight_packed"].numpy(), columns, bits) - half
    scales = tensors["weight_scale"].double().numpy()
    zeros = np.zeros(scales.shape, int)
    if "weight_zero_point" in tensors:
        zeros = fields(tensors["weight_zero_point"].numpy().T, rows, bits).T - half
    group = np.arange(columns) // (columns if groupsize == -1 else groupsize)
    return scales[:, group] * (codes - zeros[:, group])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("groupsize", "rows", "columns"),
    [(32, 64, 96), (-1, 64, 96), (12, 36, 60), (-1, 37, 75)],  # the last two leave words unfilled
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(bits, sym, groupsize, rows, columns, dtype):
    solution = solved(GPTQ.plain(bits, groupsize, sym), rows, columns, dtype)
    scheme = LayerScheme(bits, groupsize, sym)
    tensors = FORM.encode(solution, dtype, sym)

    groups = 1 if groupsize == -1 else columns // groupsize
    shapes = {
        "weight_packed": (torch.int32, (rows, -(-columns * bits // 32))),
        "weight_scale": (dtype, (rows, groups)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (-(-rows * bits // 32), groups)),
    }
    if sym:
        del shapes["weight_zero_point"]
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == shapes
    assert all(tensor.is_contiguous() for tensor in tensors.values())

    own = FORM.decode("X", tensors, scheme)
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(own, part), getattr(solution, part)), part
    assert own.wbits == bits

    other = decoded_in_numpy(tensors, bits, groupsize)
    np.testing.assert_array_equal(other.astype(np.float32), solution.weight.numpy())

    config = FORM.config({"X": scheme}, [], 0.01)
    package = BaseCompressor.get_value_from_registry(PACKED).decompress(
        tensors, QuantizationScheme(**config["config_groups"]["group_0"])
    )["weight"]
    assert package.dtype == dtype
    assert torch.equal(package, solution.weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_are_exact_in_the_model_and_in_float16(dtype):
    scales = FORM.encode(solved(RTN(4, 32), dtype=dtype), dtype, True)["weight_scale"].float()
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.to(dtype).float(), scales)
    assert FORM.storage(dtype).min_zero == 0


def test_an_asymmetric_layer_keeps_zero_points_that_all_are_the_middle():
    layer = checks.solved(RTN(4, 32, sym=False), torch.zeros(8, 64), torch.eye(64), Storage())
    assert layer.sym
    scheme = LayerScheme(4, 32, sym=False)
    assert torch.equal(
        FORM.decode("X", FORM.encode(layer, torch.float32, sym=False), scheme).zeros, layer.zeros
    )
    assert "weight_zero_point" not in FORM.encode(layer, torch.float32, layer.sym)


def test_encode_refuses_what_would_be_another_model():
    fine = checks.solved(RTN(4, 32), torch.randn(8, 64), torch.eye(64), Storage((torch.float16,)))
    with pytest.raises(SettingError, match=r"bfloat16, which cannot hold.*\n.*gptq"):
        FORM.encode(fine, torch.bfloat16, fine.sym)
    ordered = solved(GPTQ.plain(4, 32, actorder=True))
    assert not ordered.consecutive
    with pytest.raises(SettingError, match="would follow act-order"):
        FORM.encode(ordered, torch.float32, True)
    ragged = checks.solved(RTN(4, 32), torch.randn(8, 80), torch.eye(80), Storage())
    with pytest.raises(SettingError, match="does not divide the 80 columns"):
        FORM.encode(ragged, torch.float32, True)
    FORM.encode(solved(GPTQ.plain(4, 32, actorder=True, static_groups=True)), torch.float32, True)


def test_layers_that_cannot_be_written_are_refused_before_any_work():
    FORM.check("X", 37, 75, LayerScheme(3, -1, False))
    FORM.check("X", 37, 75, LayerScheme(8, 25, True))
    with pytest.raises(SettingError, match="groupsize 32 does not divide the 75 columns of X"):
        FORM.check("X", 37, 75, FOUR_BITS)
    with pytest.raises(SettingError, match=r"X would follow act-order.*\n.*--static-groups.*gptq"):
        FORM.check("X", 64, 64, replace(FOUR_BITS, actorder=True))


NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "mlp.up_proj")]


def test_config_of_one_scheme():
    config = FORM.config(dict.fromkeys(NAMES, FOUR_BITS), ["model.layers.0.attn.k_proj"], 0.01)
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": RELEASE,
        "ignore": ["model.layers.0.attn.k_proj", "lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                    "actorder": None,
                    "observer": None,
                    "observer_kwargs": {},
                    "block_structure": None,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
    }
    assert QuantizationConfig(**config).quantization_status == "compressed"
    scheme = FORM.detect(json.loads(json.dumps(config)))
    assert scheme.form is FORM
    assert scheme.layer(NAMES[0]) == FOUR_BITS
    assert scheme.layer("lm_head") is None and scheme.layer("model.layers.0.attn.k_proj") is None


def test_config_of_several_schemes_names_the_layers_of_each():
    others = (FOUR_BITS, LayerScheme(8, -1, False), LayerScheme(3, 128, True))
    layers = {name: others[i % 3] for i, name in enumerate(NAMES)}
    config = FORM.config(layers, ["lm_head"], 0.01)
    assert config["ignore"] == ["lm_head"]
    assert len(config["config_groups"]) == 3
    strategies = [g["weights"]["strategy"] for g in config["config_groups"].values()]
    assert strategies == ["group", "channel", "group"]
    QuantizationConfig(**config)
    scheme = FORM.detect(config)
    assert {name: scheme.layer(name) for name in NAMES} == layers
    assert scheme.layer("model.layers.1.attn") is None


def settings(**changes):
    return FORM.config({"layers.0.X": FOUR_BITS}, [], 0.01) | changes


def group(targets=("Linear",), weights=None, **changes):
    plain = settings()["config_groups"]["group_0"]
    weights = plain["weights"] | (weights or {})
    return plain | {"targets": list(targets), "weights": weights} | changes


def grouped(*groups, **changes):
    return settings(config_groups={f"group_{i}": g for i, g in enumerate(groups)}, **changes)


@pytest.mark.parametrize("ignore", [[], ["re:.*v_proj", "lm_head"], ["Linear"]], ids=str)
def test_layers_match_as_in_the_package(ignore):
    """Names before regular expressions before the class; each kind in alphabetical order."""
    targets = ["Linear", "re:.*mlp.*", "re:.*down.*", "re:model.layers.0", "a.mlp.down_proj", "b"]
    names = ["a.mlp.down_proj", "b", "b.mlp.down_proj", "model.layers.0.mlp.up_proj", "x.layers.0"]
    names += ["model.layers.0.v_proj", "lm_head", "bb", "mlp", "model.layers.0"]
    linear = torch.nn.Linear(1, 1)
    for chosen in (targets, targets[1:], targets[::-1], targets[1:3]):
        sizes = {target: 2 + i for i, target in enumerate(chosen)}
        groups = [group([t], {"group_size": size}) for t, size in sizes.items()]
        scheme = FORM.detect(grouped(*groups, ignore=ignore))
        for name in names:
            theirs = match.match_targets(name, linear, chosen)
            if match.is_match(name, linear, ignore):
                theirs = []
            expected = replace(FOUR_BITS, groupsize=sizes[theirs[0]]) if theirs else None
            assert scheme.layer(name) == expected, (name, chosen)


def test_configs_that_are_read():
    assert FORM.detect({"quant_method": "gptq"}) is None
    assert FORM.detect({}) is None
    for config in (
        settings(quantization_status="frozen"),
        settings(ignore=None),
        settings(sparsity_config={}, transform_config={}),
        settings(sparsity_config={"format": "dense", "targets": []}),
        grouped(group(format=None)),
        grouped(group(weights={"actorder": "static", "scale_dtype": None, "zp_dtype": None})),
        grouped(group(weights={"actorder": "weight", "observer": "mse"})),
    ):
        assert FORM.detect(config).layer("X") == FOUR_BITS
    short = group()
    short["weights"] = {"num_bits": 2, "strategy": "channel", "group_size": -1}
    assert FORM.detect(grouped(short)).layer("X") == LayerScheme(2, -1, True)
    for actorder in ("group", "dynamic"):
        config = grouped(group(weights={"actorder": actorder}))
        assert FORM.detect(config).layer("X") == replace(FOUR_BITS, actorder=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (settings(format="naive-quantized"), "kept as naive-quantized"),
        (settings(format=None), "kept as None"),
        (settings(quantization_status="initialized"), "quantization_status is initialized"),
        (settings(kv_cache_scheme={"num_bits": 8}), "has a kv_cache_scheme"),
        (settings(transform_config={"config_groups": {}}), "has a transform_config"),
        (settings(moe_sparsity_config={"a": 1}), "has a moe_sparsity_config"),
        (settings(sparsity_config={"format": "sparse-24-bitmask"}), "has a sparsity_config"),
        (settings(config_groups={}), "has no config_groups"),
        (settings(config_groups={"W4A16": ["Linear"]}), "W4A16 does not say how"),
        (grouped(group(input_activations={"num_bits": 8})), "group_0 quantizes input activations"),
        (grouped(group(output_activations={"num_bits": 8})), "quantizes output activations"),
        (grouped(group(), group(["a"], format="nvfp4-pack-quantized")), "group_1 keeps weights as"),
        (grouped(group(weights={"type": "float"})), "of type float"),
        (grouped(group(weights={"num_bits": 5})), "of num_bits 5"),
        (grouped(group(weights={"strategy": "block"})), "of strategy block"),
        (grouped(group(weights={"strategy": "tensor"})), "of strategy tensor"),
        (grouped(group(weights={"strategy": None})), "of strategy None"),
        (grouped(group(weights={"dynamic": True})), "of dynamic True"),
        (grouped(group(weights={"symmetric": "yes"})), "of symmetric yes"),
        (grouped(group(weights={"actorder": "random"})), "of actorder random"),
        (grouped(group(weights={"group_size": None})), "a group of None columns"),
        (grouped(group(weights={"group_size": 0})), "a group of 0 columns"),
        (grouped(group(weights={"strategy": "channel"})), "a channel of 32 columns"),
        (grouped(group(["Embedding"])), "name the class Embedding"),
        (grouped(group(["re:("])), r"the targets of group_0 holds re:\("),
        (settings(config_groups={"group_0": group() | {"targets": "Linear"}}), "no list of names"),
        (settings(ignore=["re:["]), r"ignore holds re:\["),
        (settings(ignore="lm_head"), "ignore is no list of names"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(ModelError, match=message):
        FORM.detect(config)


def encoded(sym=True, rows=36, columns=96):
    return FORM.encode(solved(RTN(4, 32, sym), rows, columns), torch.float32, sym)


@pytest.mark.parametrize(
    ("sym", "changes", "message"),
    [
        (True, {"weight_packed": torch.zeros(36, 11, dtype=torch.int32)}, "weight_packed is .*11"),
        (True, {"weight_packed": torch.zeros(36, 12)}, "weight_packed is torch.float32"),
        (True, {"weight_scale": torch.ones(36, 2)}, r"weight_scale is .*where .*\[36, 3\]"),
        (True, {"weight_scale": torch.ones(36, 3, dtype=torch.int32)}, "weight_scale is torch.int"),
        (True, {"weight_shape": torch.tensor([36, 64])}, r"where .*\[36, 8\] fits 36 rows, 64 col"),
        (True, {"weight_shape": torch.tensor([35, 96])}, "fits 35 rows, 96 columns"),
        (True, {"weight_shape": torch.tensor([36, 95])}, "95 columns in groups of 32"),
        (True, {"weight_shape": torch.tensor([36])}, r"weight_shape is \[36\]"),
        (True, {"weight_shape": torch.tensor([36, -96])}, "no rows and columns"),
        (True, {"weight_zero_point": torch.zeros(5, 3, dtype=torch.int32)}, "its config denies"),
        (False, {"weight_zero_point": None}, "no weight_zero_point, which its config asks for"),
        (False, {"weight_zero_point": torch.zeros(5, 2, dtype=torch.int32)}, "zero_point is"),
        (False, {"weight_zero_point": torch.zeros(36, 3, dtype=torch.int8)}, "is torch.int8"),
        (True, {"weight_g_idx": torch.arange(96) // 32}, "has a weight_g_idx"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(sym, changes, message):
    tensors = {k: v for k, v in (encoded(sym) | changes).items() if v is not None}
    with pytest.raises(ModelError, match=message) as caught:
        FORM.decode("model.X", tensors, LayerScheme(4, 32, sym))
    assert caught.value.cause.startswith("model.X")


def test_more_groups_than_the_config_says_are_refused():
    with pytest.raises(ModelError, match=r"weight_scale is .*\[36, 3\].*\[36, 2\] fits.*of 48"):
        FORM.decode("X", encoded(), LayerScheme(4, 48, True))
    with pytest.raises(ModelError, match=r"weight_packed is .*\[36, 12\] where .*\[36, 24\]"):
        FORM.decode("X", encoded(), LayerScheme(8, 32, True))


def test_act_order_groups_of_old_files():
    scheme = replace(FOUR_BITS, actorder=True)
    tensors = encoded()
    plain = FORM.decode("X", tensors, FOUR_BITS)
    g_idx = torch.randperm(96) // 32
    layer = FORM.decode("X", tensors | {"weight_g_idx": g_idx}, scheme)
    assert torch.equal(layer.g_idx, g_idx.int()) and layer.g_idx.dtype == torch.int32
    for column in (0, 50, 95):
        expected = plain.scales[:, g_idx[column]] * (plain.codes[:, column].float() - 8)
        assert torch.equal(layer.weight[:, column], expected)
    # Registered by the package, and never filled.
    unset = FORM.decode("X", tensors | {"weight_g_idx": torch.full((96,), -1)}, scheme)
    assert torch.equal(unset.weight, plain.weight)
    for wrong, message in (
        (torch.full((96,), 3), r"weight_g_idx names groups outside 0 \.\. 2"),
        (torch.full((96,), -2), "names groups outside"),
        (torch.zeros(95, dtype=torch.int32), "weight_g_idx is torch.int32"),
        (torch.zeros(96), "weight_g_idx is torch.float32"),
    ):
        with pytest.raises(ModelError, match=message):
            FORM.decode("X", tensors | {"weight_g_idx": wrong}, scheme)
    with pytest.raises(ModelError, match="no weight_g_idx, which its config asks for"):
        FORM.decode("X", tensors, scheme)


def test_encode_of_a_decoded_layer_is_the_same_bytes():
    tensors = encoded(sym=False)
    layer = FORM.decode("X", tensors, LayerScheme(4, 32, False))
    assert isinstance(layer, QuantizedWeight)
    again = FORM.encode(layer, torch.float32, layer.sym)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[suffix], tensors[suffix]) for suffix in tensors)


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LLAMA = zoo.Row("wide", lambda: zoo_configs.llama(**WIDE), "model.layers", ())
BIASES = zoo.Row(
    "wide_biases",
    lambda: zoo_configs.llama(**WIDE, attention_bias=True, mlp_bias=True),
    "model.layers",
    (),
    dtype=torch.bfloat16,
)


# transformers 5.23 with compressed-tensors 0.19 or 0.20 reads no asymmetric file, llm-compressor's
# own among them, unless asked to dequantize while loading: it makes room for unpacked zero points.
UNPACKED = pytest.mark.xfail(
    raises=RuntimeError, reason="transformers expects unpacked zero points"
)


@pytest.mark.parametrize(
    ("row", "quantizer", "skip", "on_load"),
    [
        (LLAMA, GPTQ.plain(2, 32), None, False),
        (LLAMA, GPTQ.plain(3, 128, sym=False), "v_proj", True),
        pytest.param(LLAMA, GPTQ.plain(3, 128, sym=False), "v_proj", False, marks=UNPACKED),
        (LLAMA, GPTQ.plain(4, 128), "layers.0", True),
        (LLAMA, GPTQ.plain(8, -1, sym=False), None, True),
        (BIASES, GPTQ.plain(2, -1, sym=False), None, True),
        (BIASES, GPTQ.plain(3, 32), r"1\.mlp\.down_proj", False),
        (BIASES, GPTQ.plain(4, 32, sym=False, actorder=True, static_groups=True), None, True),
        (BIASES, GPTQ.plain(8, 128), None, False),
        (BY_NAME["llama_tied"], GPTQ.plain(4, -1), None, False),
    ],
    ids=lambda value: value.name if isinstance(value, zoo.Row) else str(value),
)
def test_transformers_reads_what_we_write(tmp_path, row, quantizer, skip, on_load):
    """Bit for bit: the weights and, as the same products of the same numbers, the logits."""
    source = zoo.save(row, tmp_path / "source")
    model = ModelConfig(str(source), device="cpu")
    options = {"calib": zoo.token_ids(4, 24), "skip": skip, "format": FORM.name}
    result = Runner(model, quantizer, **options).run()
    result.save(tmp_path / "out")
    assert not (tmp_path / "out" / "quantize_config.json").exists()

    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if on_load else {}
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, **how
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = theirs(zoo.token_ids()).logits  # decompresses
        assert torch.equal(logits, result.model(zoo.token_ids()).logits)
    weights = dict(theirs.named_parameters())
    for name, parameter in result.model.named_parameters():
        assert weights[name].dtype == row.dtype
        assert torch.equal(weights[name], parameter), name
    ours = load(tmp_path / "out", device="cpu")
    packed = {name for name, module in ours.named_modules() if type(module) is QuantizedLinear}
    assert packed == {record.name for record in result.layers}
    for name in packed:
        assert torch.equal(ours.get_submodule(name).weight.to(row.dtype), weights[f"{name}.weight"])
