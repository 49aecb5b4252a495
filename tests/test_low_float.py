"""Models in fp8 and MXFP4 are quantized as their dequantized weights would be, block by block."""

import json
import shutil

import low_float
import pytest
import torch
import transformers
import zoo
import zoo_configs as configs
from low_float import BLOCK, FP8, MXFP4, code, compressed_tensors, in_blocks, out_of_blocks
from safetensors.torch import load_file, save_file
from transformers.quantizers import quantizer_finegrained_fp8

from optq import GPTQ, RTN, ModelConfig, Runner, load
from optq.compare import Comparison
from optq.errors import ModelError, NumericsError
from optq.formats.describe import describe
from optq.model.dequantize import Dequantized
from optq.quantize import Quantization
from optq.record import TIMES

CALIB = zoo.token_ids(4, 32)
# name -> the model, its settings, what codes a matrix
SOURCES = {
    "qwen3": (configs.qwen3, FP8, in_blocks),
    "qwen3_moe": (configs.qwen3_moe, FP8, in_blocks),
    "deepseek_v3": (configs.deepseek_v3, FP8, in_blocks),
    "channel": (configs.qwen3, compressed_tensors("channel"), low_float.by_channel),
    "tensor": (configs.qwen3, compressed_tensors("tensor"), low_float.by_tensor),
    "channel_moe": (configs.qwen3_moe, compressed_tensors("channel"), low_float.by_channel),
    "gpt_oss": (configs.gpt_oss, MXFP4, low_float.in_mxfp4),
}
LOADS = {
    "fp8": transformers.FineGrainedFP8Config,
    "mxfp4": transformers.Mxfp4Config,
    "compressed-tensors": transformers.CompressedTensorsConfig,
}


def is_coded(name):
    return "layers." in name and ".gate.weight" not in name


def build(config):
    return zoo.Row("", config, "", (), dtype=torch.bfloat16).build()


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    made = {}

    def folders(name):
        """The model in codes, and as transformers dequantizes it."""
        if name not in made:
            config, settings, how = SOURCES[name]
            coded = tmp_path_factory.mktemp("low") / name
            build(config).save_pretrained(coded)
            zoo.tokenizer().save_pretrained(coded)
            plain = shutil.copytree(coded, coded.with_name("plain"))
            code(coded, settings, how, is_coded)
            read = LOADS[settings["quant_method"]](**settings, dequantize=True)
            with pytest.MonkeyPatch.context() as patch:  # which they ask for, and do not use here
                patch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
                theirs = transformers.AutoModelForCausalLM.from_pretrained(
                    coded, quantization_config=read
                )
            model = build(config)
            model.load_state_dict(theirs.state_dict())
            model.save_pretrained(plain)
            made[name] = coded, plain
        return made[name]

    return folders


def quantize(folder, quantizer=None, **options):
    options = {"calib": CALIB, "qep": True} | options
    return Runner(ModelConfig(str(folder), "cpu"), quantizer or GPTQ(4, 32), **options).run()


def same_files(one, other):
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in other.iterdir()}
    for name in files - {TIMES}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, "compressed-tensors") for name in SOURCES), ("qwen3", "gptq"), ("gpt_oss", "gptq")],
)
def test_the_run_is_that_of_the_dequantized_model(sources, tmp_path, name, form):
    coded, plain = sources(name)
    skip = r"layers\.0\.|o_proj"  # what stays dense
    for folder in (coded, plain):
        quantize(folder, format=form, output=tmp_path / folder.name, skip=skip)
    written = tmp_path / coded.name
    same_files(written, tmp_path / plain.name)
    dense = {n for n in load_file(written / "model.safetensors") if n.endswith("weight")}
    assert any("layers.0." in name for name in dense)
    assert load(written, "cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("name", SOURCES)
def test_every_tensor_is_what_transformers_makes_of_it(sources, name):
    """Its layout too, which is known before any weight is read."""
    coded, plain = (ModelConfig(str(folder)).checkpoint() for folder in sources(name))
    theirs = dict(plain.tensors())
    assert coded.layout.keys() == coded.files.keys() == theirs.keys()
    assert all(tensor.is_meta for tensor in coded.layout.values())
    for tensor_name, tensor in coded.tensors():
        layout = coded.layout[tensor_name]
        assert torch.equal(tensor, theirs[tensor_name]), tensor_name
        assert (
            (layout.shape, layout.dtype)
            == (tensor.shape, tensor.dtype)
            == (
                theirs[tensor_name].shape,
                torch.bfloat16 if name != "deepseek_v3" else theirs[tensor_name].dtype,
            )
        )
    assert "quantization_config" not in coded.config()


def test_blocks_are_dequantized_one_at_a_time(sources, tmp_path, monkeypatch):
    made, during = [], []
    make, done = Dequantized._made, Quantization.done

    def counted(checkpoint, name, tensors):
        made.append(name)
        return make(checkpoint, name, tensors)

    monkeypatch.setattr(Dequantized, "_made", counted)

    def watched(work, block, error):
        during.append((block.index, [*made]))
        made.clear()
        done(work, block, error)

    monkeypatch.setattr(Quantization, "done", watched)
    folder = shutil.copytree(sources("deepseek_v3")[0], tmp_path / "source")
    add_draft(folder)
    quantize(folder, RTN(4, 32), qep=False, output=tmp_path / "out")
    assert [index for index, _ in during] == [0, 1]
    for index, names in during:
        assert names and len(names) == len({*names})
        assert all(f"layers.{index}." in name for name in names)
    assert {name.split(".")[2] for name in made} == {"2"}  # at the end, what stays dense


def add_draft(folder):
    """A copy of the last layer, as one for multi-token prediction; its tensors on disk."""
    state = load_file(folder / "model.safetensors")
    last = {n: t for n, t in state.items() if n.startswith("model.layers.1.")}
    more = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in last.items()}
    more |= {f"model.layers.2.eh_proj.{p}": t for p, t in in_blocks(torch.randn(64, 128)).items()}
    save_file(state | more, folder / "model.safetensors", metadata={"format": "pt"})
    return more


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_layers_for_drafts_travel_dequantized(sources, tmp_path, form):
    folder = shutil.copytree(sources("deepseek_v3")[0], tmp_path / "source")
    more = add_draft(folder)
    quantize(folder, RTN(4, 32), qep=False, output=tmp_path / "out", format=form)
    state = load_file(tmp_path / "out" / "model.safetensors")
    weights = {n for n, t in more.items() if t.dtype == torch.float8_e4m3fn}
    assert any(".experts.3." in name for name in weights)
    for name in weights:
        expected = out_of_blocks(more[name], more[f"{name}_scale_inv"])
        assert torch.equal(state[name], expected)
    for name in more.keys() - weights - {f"{name}_scale_inv" for name in weights}:
        assert torch.equal(state[name], more[name])
    assert not any(name.endswith("scale_inv") or t.itemsize == 1 for name, t in state.items())
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == form
    if form == "compressed-tensors":
        assert "model.layers.2.eh_proj" in settings["ignore"]


@pytest.mark.parametrize("block", [(32, 32), (48, 80), (128, 128)])
def test_last_blocks_that_are_smaller(tmp_path, block):
    """As DeepSeek's 576 rows in blocks of 128, which transformers refuses or cuts evenly."""
    build(configs.deepseek_v3).save_pretrained(tmp_path)
    settings = FP8 | {"weight_block_size": [*block]}
    code(tmp_path, settings, lambda weight: in_blocks(weight, block), is_coded)
    state = load_file(tmp_path / "model.safetensors")
    checkpoint = ModelConfig(str(tmp_path)).checkpoint()
    made = {n: t for n, t in checkpoint.tensors() if f"{n}_scale_inv" in state}
    assert any(t.shape[0] % block[0] for t in made.values())
    for name, tensor in made.items():
        expected = out_of_blocks(state[name], state[f"{name}_scale_inv"], block)
        assert torch.equal(tensor, expected) and tensor.is_contiguous(), name
        assert checkpoint.layout[name].shape == tensor.shape


def test_the_dtype_is_the_config_s_or_bfloat16_or_what_is_asked_for(sources, tmp_path):
    folder = shutil.copytree(sources("qwen3")[0], tmp_path / "source")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    name = "model.layers.0.mlp.up_proj.weight"
    state = load_file(folder / "model.safetensors")
    wide = state[name].float() * state[f"{name}_scale_inv"].repeat_interleave(
        BLOCK[0], 0
    ).repeat_interleave(BLOCK[1], 1)
    for asked, dtype in ((None, torch.bfloat16), ("float32", torch.float32)):
        checkpoint = ModelConfig(str(folder), "cpu", asked).checkpoint()
        assert checkpoint.layout[name].dtype == dtype
        assert torch.equal(dict(checkpoint.tensors([name]))[name], wide.to(dtype))
        out = tmp_path / str(asked)
        Runner(ModelConfig(str(folder), "cpu", asked), RTN(4, 32), calib=CALIB, output=out).run()
        assert load(out, "cpu").dtype == dtype
    path.write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    assert ModelConfig(str(folder)).checkpoint().layout[name].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["qwen3_moe", "channel", "gpt_oss"])
def test_whoever_loads_a_model_in_codes_gets_the_plain_one(sources, name):
    coded, plain = (load(folder, "cpu") for folder in sources(name))
    for parameter, other in zip(coded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_models_in_codes_are_compared(sources):
    rows = []
    for folder in sources("qwen3"):
        config = ModelConfig(str(folder), "cpu")
        how = {"calib": "demo", "text": "demo", "nsamples": 2, "seqlen": 32}
        one = Comparison(config, ("rtn",), (4,), (32,), **how).run()
        rows.append([(row.method, row.bytes, row.perplexity) for row in one])
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_what_is_inspected_is_named(sources):
    coded, _ = sources("qwen3")
    what = describe(ModelConfig(str(coded)).checkpoint())
    assert what["format"] == "fp8, read as bfloat16"
    assert what["bytes"] == sum(t.nbytes for t in load_file(coded / "model.safetensors").values())


def lose_a_scale(state, config):
    del state["model.layers.1.mlp.up_proj.weight_scale_inv"]


def of_integers(state, config):
    settings = compressed_tensors("channel") | {"format": "int-quantized"}
    settings["config_groups"]["group_0"]["weights"]["type"] = "int"
    config["quantization_config"] = settings


def some_integers(state, config):
    of_integers(state, config)
    floats = compressed_tensors("channel")["config_groups"]["group_0"]
    config["quantization_config"]["config_groups"]["group_1"] = floats


def of_nothing(state, config):
    config["quantization_config"] = compressed_tensors("channel") | {"config_groups": None}


def a_scale_of_another_size(state, config):
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    state[name] = torch.ones(7, 1)


def bad_settings(state, config):
    config["quantization_config"] = FP8 | {"weight_block_size": [128]}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_a_scale, "up_proj.weight (float8_e4m3fn) is of a quantized model"),
        (of_integers, "input activations in another way than by token in 8 bits"),
        (some_integers, "input activations in another way than by token in 8 bits"),
        (of_nothing, "kept as float-quantized"),
        (a_scale_of_another_size, "model.layers.1.mlp.up_proj.weight cannot be dequantized"),
        (bad_settings, "the settings of fp8 cannot be read"),
    ],
)
def test_what_cannot_be_dequantized_is_refused(sources, tmp_path, damage, said):
    folder = shutil.copytree(sources("qwen3")[0], tmp_path / "source")
    state, config = load_file(folder / "model.safetensors"), folder / "config.json"
    settings = json.loads(config.read_text())
    damage(state, settings)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.write_text(json.dumps(settings))
    with pytest.raises(ModelError) as caught:
        quantize(folder, RTN(4, 32))
    assert said in caught.value.cause and "\n" not in caught.value.cause


@pytest.mark.parametrize("where", ["weights", "scales"])
def test_weights_that_are_not_finite_are_refused(sources, tmp_path, where):
    folder = shutil.copytree(sources("qwen3")[0], tmp_path / "source")
    state, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    name += "_scale_inv" if where == "scales" else ""
    state[name].view(-1)[0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="up_proj"):
        quantize(folder, RTN(4, 32), qep=False)
