"""Sparse experts, family by family: found, reached, solved, written, and read back.

The models are tiny and random, with four experts to a block; what is asserted is that nothing is
missed: each expert's projections are sites, the forward through our function is the model's own,
and what is written is what was measured, for our reader and for transformers.
"""

import json
import re
import shutil

import pytest
import torch
import transformers
import zoo
import zoo_configs as configs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from optq import GPTQ, RTN, ModelConfig, Runner, load
from optq.errors import ModelError
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.experts import is_bank
from optq.model.experts_call import called_through
from optq.model.linear import QuantizedLinear, make_dense
from optq.model.names import disk_names, merges
from optq.model.source import load_model

CALIB = zoo.token_ids(8, 48)
# What stays dense inside the blocks, by the last part of its name, and how many layers are solved.
FAMILIES = {
    "mixtral": (set(), 32),
    "qwen2_moe": ({"shared_expert_gate"}, 38),
    "qwen3_moe": (set(), 32),
    "olmoe": (set(), 32),
    "deepseek_v3": (set(), 28),
    "gpt_oss": (set(), 32),
    "granite_moe": (set(), 32),
    "phimoe": ({"router"}, 32),
    "jamba": ({"dt_proj"}, 22),
    "ernie_moe": (set(), 26),
    "glm4_moe": (set(), 26),
    "nemotron_h": (set(), 16),
    "qwen3_next": ({"shared_expert_gate", "in_proj_ba"}, 36),
    "qwen3_5_moe": ({"shared_expert_gate", "in_proj_b", "in_proj_a"}, 37),
    "granite_hybrid_moe": (set(), 34),
    "llama4": ({"router"}, 38),
}
# Fused on disk, these have no names of single experts that transformers would read.
FUSED = {"gpt_oss", "granite_moe", "granite_hybrid_moe"}


def build(name, dtype=torch.float32):
    row = zoo.Row(name, getattr(configs, name), "", ())
    return row.build().to(dtype)


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=zoo.token_ids() if ids is None else ids, use_cache=False).logits


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("experts") / name
            build(name).save_pretrained(made[name])
            zoo.tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


def quantize(folder, quantizer=None, **options):
    options = {"calib": CALIB, "qep": True} | options
    return Runner(ModelConfig(str(folder), "cpu"), quantizer or GPTQ(4, 32), **options).run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_through_our_function_is_the_model_s_own(name, dtype):
    model = build(name, dtype)
    banks = [bank for block in find_blocks(model) for bank in block.banks]
    model.set_experts_implementation("eager")
    expected, calls = logits(model), []

    def compute(bank, x, index, weights):
        calls.append(bank.name)
        routed = bank.routed(index)
        return bank.combine(x, routed, bank.inside(x, routed), weights)

    with called_through(banks, compute):
        assert torch.equal(logits(model), expected)
    assert calls == [bank.name for bank in banks] and calls
    assert torch.equal(logits(model), expected) and len(calls) == len(banks)  # taken back


@pytest.mark.parametrize("name", FAMILIES)
def test_every_projection_of_every_expert_is_solved_and_read_back(folder_of, tmp_path, name):
    source, (dense, count) = folder_of(name), FAMILIES[name]
    plain = quantize(source, format="compressed-tensors")
    result = quantize(source, format="compressed-tensors", output=tmp_path / "out")
    assert len(result.layers) == count
    assert {layer.rpartition(".")[2] for layer in result.dense} == dense
    model = load_model(Checkpoint.open(str(source)))
    expected = {
        f"{bank}.{expert}.{part}"
        for bank, module in model.named_modules()
        if is_bank(module)
        for expert in range(4)
        for part in (
            ("gate_proj", "up_proj") if getattr(module, "has_gate", True) else ("up_proj",)
        )
        + ("down_proj",)
    }
    solved = {layer.name: layer for layer in result.layers}
    assert expected and expected <= solved.keys()
    assert all(solved[each].error <= solved[each].rtn_error * (1 + 1e-6) for each in expected)
    ids = CALIB.numel()
    for bank in {each.rsplit(".", 2)[0] for each in expected}:
        tokens = [solved[f"{bank}.{expert}.down_proj"].tokens for expert in range(4)]
        assert sum(tokens) == (1 if name == "llama4" else 2) * ids

    reloaded = load(tmp_path / "out", "cpu")
    packed = {n for n, m in reloaded.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == count and not any(is_meta(p) for p in reloaded.parameters())
    wanted = logits(plain.model)
    assert (logits(reloaded) - wanted).norm() < 0.05 * wanted.norm()
    make_dense(reloaded)
    torch.testing.assert_close(logits(reloaded), wanted, rtol=1e-5, atol=1e-5)


def is_meta(tensor):
    return tensor.device.type == "meta"


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - FUSED))
def test_transformers_reads_the_same_model(folder_of, tmp_path, name):
    """With compressed-tensors, which merges the experts while it loads."""
    out = tmp_path / "out"
    result = quantize(folder_of(name), format="compressed-tensors", output=out)
    model, report = AutoModelForCausalLM.from_pretrained(
        out,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    ours = result.model
    make_dense(ours)
    torch.testing.assert_close(logits(model), logits(ours), rtol=1e-5, atol=1e-5)


def told(folder, quantizer=None, **options):
    lines = []
    quantize(folder, quantizer or RTN(4, 32), qep=False, notice=lines.append, **options)
    return lines


def test_who_cannot_read_the_experts_is_told(folder_of, tmp_path):
    slow = "vLLM runs these experts without its fast kernel: their 64 inputs are no multiple of 128"
    singly = "transformers has the experts of this model in one tensor and reads none singly"
    mixtral, packed = folder_of("mixtral"), {"format": "compressed-tensors"}
    assert told(mixtral, **packed) == [slow]
    assert told(mixtral, format="gptq") == [
        "transformers does not read experts from these files: compressed-tensors it does",
        slow,
    ]
    llama = folder_of("llama4")  # transformers has a module for each expert of packed ones
    assert told(llama, **packed) == [slow]
    assert f"{singly}: these files are for vLLM and OPTQ" in told(llama, format="gptq")
    asymmetric = told(llama, RTN(4, 32, sym=False), **packed)
    assert asymmetric[0] == "transformers reads experts from these files only if symmetric (--sym)"
    assert told(folder_of("granite_moe"), output=tmp_path / "out", **packed) == [
        f"{singly}: these files are for vLLM and OPTQ",
        slow,
    ]
    assert told(folder_of("gpt_oss"), **packed) == [f"{singly}: these files are for OPTQ alone"]


DENSE = "transformers does not load these files: it wants no expert left dense (--skip)"


@pytest.mark.parametrize("skip", [r"\bexperts", r"layers\.1\..*\bexperts"])
@pytest.mark.parametrize("name", ["mixtral", "nemotron_h", "llama4", "gpt_oss", "granite_moe"])
def test_experts_left_dense_that_transformers_does_not_load(folder_of, tmp_path, name, skip):
    """It does not where it merges, or takes apart, what is on disk."""
    loads, out = name in ("gpt_oss", "granite_moe"), tmp_path / "out"
    lines = told(folder_of(name), skip=skip, format="compressed-tensors", output=out)
    assert (DENSE in lines) is not loads
    if loads and skip.startswith("layers"):  # others are packed, which it does not read either
        assert any("reads none singly" in line for line in lines)
        return
    assert [line for line in lines if "transformers" in line] == [DENSE] * (not loads)
    try:
        _, report = AutoModelForCausalLM.from_pretrained(
            out,
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
            output_loading_info=True,
        )
        assert bool(report["missing_keys"]) is not loads
    except RuntimeError as error:
        assert not loads and "conversion" in str(error)
    assert DENSE not in told(folder_of(name), skip=skip, format="gptq")
    reloaded = load(out, "cpu")
    assert torch.isfinite(logits(reloaded)).all()


def test_an_export_tells_as_well(folder_of, tmp_path):
    from optq.formats import FORMATS
    from optq.formats.export import export

    singly = "transformers does not read experts from these files: compressed-tensors it does"
    for skip, to_gptq, back in ((None, singly, "vLLM runs"), ("experts", None, DENSE)):
        out, lines = tmp_path / str(skip), []
        told(folder_of("mixtral"), format="compressed-tensors", output=out, skip=skip)
        for form, expected in (("gptq", to_gptq), ("compressed-tensors", back)):
            source, out, lines = out, tmp_path / f"{skip}.{form}", []
            export(Checkpoint.open(str(source)), out, FORMATS[form], notice=lines.append)
            assert bool(lines) is bool(expected) and all(
                line.startswith(expected) for line in lines[:1]
            )


@pytest.mark.parametrize("skip", [None, r"\bexperts", r"layers\.1\..*\bexperts"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_routers_are_declared_dense(folder_of, tmp_path, name, skip):
    for form in ("compressed-tensors", "gptq"):
        out = tmp_path / form
        quantize(folder_of(name), RTN(4, 32), qep=False, skip=skip, format=form, output=out)
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        routers = [n.removesuffix(".weight") for n in load_file(out / "model.safetensors")]
        routers = [n for n in routers if n.endswith((".gate", "shared_expert_gate"))]
        assert routers
        if form == "gptq":
            assert {f"-:^{n.replace('.', chr(92) + '.')}$" for n in routers} <= {
                *settings["dynamic"]
            }
        else:
            assert {*routers} <= {*settings["ignore"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_scheme_for_all_experts_and_each_dense_matrix_is_declared(folder_of, tmp_path, name):
    """One config group, as transformers' loader wants it; full names, as vLLM does."""
    for form in ("compressed-tensors", "gptq"):
        told(folder_of(name), format=form, output=tmp_path / form)
        settings = json.loads((tmp_path / form / "config.json").read_text())["quantization_config"]
        state = load_file(tmp_path / form / "model.safetensors")
        matrices = [n.removesuffix(".weight") for n, t in state.items() if t.ndim == 2]
        dense = {n for n in matrices if f"{n}.weight" in state and "embed" not in n}
        if form == "gptq":
            rules = settings.get("dynamic", {})
            found = [re.compile(rule[2:]) for rule in rules if rule.startswith("-:")]
            assert len(found) == len(rules)  # and no second scheme
            undeclared = {n for n in dense if not any(each.match(n) for each in found)}
            assert undeclared <= {"lm_head"} and settings["lm_head"] is False
        else:
            assert [*settings["config_groups"]] == ["group_0"]
            assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]
            assert dense | {"lm_head"} == {*settings["ignore"]}


@pytest.mark.parametrize(
    ("name", "place"), [("deepseek_v3", "model.layers.2."), ("qwen3_next", "mtp.layers.0.")]
)
def test_layers_for_multi_token_prediction_travel_and_are_declared(
    folder_of, tmp_path, name, place
):
    source = tmp_path / "source"
    shutil.copytree(folder_of(name), source)
    state = load_file(source / "model.safetensors")
    last = {n: t for n, t in state.items() if n.startswith("model.layers.1.")}
    more = {n.replace("model.layers.1.", place): t.clone() for n, t in last.items()}
    more[f"{place}eh_proj.weight"] = torch.ones(64, 128)
    save_file(state | more, source / "model.safetensors", metadata={"format": "pt"})
    matrices = {n.removesuffix(".weight") for n, t in more.items() if t.ndim == 2}
    assert any(".experts.3." in n for n in matrices)
    for form in ("compressed-tensors", "gptq"):
        out = tmp_path / form
        told(source, format=form, output=out)
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(found[n], t) for n, t in more.items())
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        if form == "gptq":
            assert any(rule.startswith("-:") and "mtp" in rule for rule in settings["dynamic"])
            inside = re.compile(rf"^{re.escape(place[:-1])}\.")
            assert all(inside.match(n) for n in matrices)
            rules = [re.compile(rule[2:]) for rule in settings["dynamic"]]
            assert all(any(rule.match(n) for rule in rules) for n in matrices)
        else:
            assert matrices | {"re:.*mtp.*"} <= {*settings["ignore"]}
        assert torch.isfinite(logits(load(out, "cpu"))).all()


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granite_moe", "nemotron_h", "llama4"])
def test_dense_experts_are_declared_by_the_names_that_vllm_asks_for(
    folder_of, tmp_path, name, form
):
    """In gptq the experts' of a block, in compressed-tensors three of the first expert."""
    out = tmp_path / "out"
    told(folder_of(name), skip=r"layers\.1\..*\bexperts", format=form, output=out)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    model = load_model(Checkpoint.open(str(folder_of(name))))
    bank = next(n for n, m in model.named_modules() if is_bank(m) and ".1." in n)
    names = disk_names(model, Checkpoint.open(str(folder_of(name))).files)
    single = {n.removesuffix(".weight") for at, n in names.items() if at.startswith(f"{bank}.")}
    single = {n for n in single if ".experts." in n and re.search(r"\.\d\.\w+$", n)}
    (place,) = {n.rsplit(".", 2)[0] for n in single}
    if form == "gptq":
        rules = [rule for rule in settings["dynamic"] if "experts" in rule and "shared" not in rule]
        assert rules == [rf"-:^{re.escape(place)}(\.|$)"]
        assert all(re.match(rules[0][2:], each) for each in (place, *single))
    else:
        asked = {f"{place}.0.{part}_proj" for part in ("gate", "up", "down")}
        assert {n for n in settings["ignore"] if n.startswith(f"{place}.")} == single | asked
    reloaded = load(out, "cpu")
    packed = [n for n, m in reloaded.named_modules() if isinstance(m, QuantizedLinear)]
    assert packed and not any(n.startswith(f"{bank}.") for n in packed)
    kept = dict(model.named_parameters())[f"{bank}.down_proj"]
    assert torch.equal(dict(reloaded.named_parameters())[f"{bank}.down_proj"], kept)


FUSED_NAMES = {  # one of a fused source, beside it on disk
    "granite_moe": "model.layers.0.block_sparse_moe.experts.3.w3",
    "gpt_oss": "model.layers.0.mlp.experts.3.up_proj",
}


@pytest.mark.parametrize("name", FUSED_NAMES)
def test_experts_of_one_tensor_are_named_as_vllm_names_them(folder_of, tmp_path, name):
    told(folder_of(name), format="compressed-tensors", output=tmp_path / "out")
    found = {n.rpartition(".")[0] for n in load_file(tmp_path / "out" / "model.safetensors")}
    assert FUSED_NAMES[name] in found


def test_a_hybrid_s_experts_have_the_names_of_most():
    """vLLM's Granite 4 reads gate_proj where its Granite 3 reads w1."""
    config = transformers.GraniteMoeHybridConfig(
        **configs._COMMON | configs._LOCAL,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_n_groups=1,
    )
    with torch.device("meta"):
        model = transformers.GraniteMoeHybridForCausalLM(config)
    on_disk = "model.layers.1.block_sparse_moe.input_linear.weight"
    place = "model.layers.1.block_sparse_moe.experts"
    names = disk_names(model, [on_disk])
    assert names[f"{place}.gate_up_proj"] == on_disk
    assert names[f"{place}.3.up_proj.weight"] == f"{place}.3.up_proj.weight"
    for part in ("gate_proj", "w1"):  # both are read
        assert disk_names(model, [f"{place}.2.{part}.weight"]) == {
            f"{place}.2.gate_proj.weight": f"{place}.2.{part}.weight"
        }


def test_fused_experts_that_transformers_reads_singly(folder_of, tmp_path):
    """As some files of Qwen3.5: under names of their own the loader merges them like others'."""
    source = tmp_path / "source"
    shutil.copytree(folder_of("qwen3_moe"), source)
    (source / "model.safetensors").unlink()
    model = build("qwen3_moe")
    save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    assert told(source, skip="experts", format="compressed-tensors") == []  # as it finds them
    lines = told(source, format="compressed-tensors", output=tmp_path / "out")
    assert not any("transformers" in line for line in lines)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    ours = load(tmp_path / "out", "cpu")
    make_dense(ours)
    torch.testing.assert_close(logits(loaded), logits(ours), rtol=1e-5, atol=1e-5)
    assert not any("gate_up_proj" in n for n in load_file(tmp_path / "out" / "model.safetensors"))


def test_names_of_fused_experts_are_where_the_source_has_them():
    """Qwen3.5's files say model.language_model where the model says model."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    config = transformers.Qwen3_5MoeTextConfig(
        **configs._COMMON | configs._EXPERTS | linear,
        linear_value_head_dim=16,
        num_experts=4,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    with torch.device("meta"):
        model = transformers.Qwen3_5MoeForCausalLM(config)
    place = "model.language_model.layers.1.mlp.experts"
    names = disk_names(model, [f"{place}.gate_up_proj", f"{place}.down_proj"])
    assert names["model.layers.1.mlp.experts.3.gate_proj.weight"] == f"{place}.3.gate_proj.weight"
    assert merges(model, f"{place}.3.gate_proj.weight")


def test_gptq_files_and_exports_hold_experts_too(folder_of, tmp_path):
    from optq.formats import FORMATS
    from optq.formats.export import export

    source = folder_of("qwen3_moe")
    quantize(source, format="gptq", output=tmp_path / "gptq")
    export(Checkpoint.open(str(tmp_path / "gptq")), tmp_path / "ct", FORMATS["compressed-tensors"])
    quantize(source, format="compressed-tensors", output=tmp_path / "direct")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("ct", "direct"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one if "weight_packed" in n)
    assert torch.equal(logits(load(tmp_path / "gptq", "cpu")), logits(load(tmp_path / "ct", "cpu")))


@pytest.mark.parametrize("memory", [0, 2**29])
def test_the_same_seed_gives_the_same_bytes(folder_of, tmp_path, monkeypatch, memory):
    monkeypatch.setattr("optq.solving.MEMORY", memory)  # experts one by one, or all together
    for name in ("one", "other"):
        quantize(folder_of("mixtral"), GPTQ(3, 32), output=tmp_path / name)
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("quantizer", [RTN(3, 32), GPTQ.plain(3, 32), GPTQ(3, 32)])
@pytest.mark.parametrize("qep", [False, True])
def test_an_expert_that_no_token_reached_is_solved_from_its_block_s(tmp_path, quantizer, qep):
    model = zoo.without_tokens(build("mixtral"))
    model.save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    bank = find_blocks(model)[0].banks[0]
    kept = {n: getattr(bank.module, n)[3].detach().clone() for n in ("gate_up_proj", "down_proj")}
    result = quantize(tmp_path / "model", quantizer, qep=qep)
    solved = {layer.name: layer for layer in result.layers}
    for part in ("gate_proj", "up_proj", "down_proj"):
        record = solved[f"{bank.name}.3.{part}"]
        assert record.tokens == 0 and record.borrowed > 0 and record.dead_columns < record.cols
        assert 0 < record.error <= record.rtn_error * (1 + 1e-6)
    for name, weight in kept.items():
        found = dict(result.model.named_parameters())[f"{bank.name}.{name}"][3]
        assert torch.isfinite(found).all()
        assert 0.01 < (found - weight).norm() / weight.norm() < 0.5


def test_experts_that_no_batch_called_travel_as_they_are(folder_of, tmp_path, monkeypatch):
    """Fused on disk, they must not go with those that were replaced."""
    last = build("granite_moe").model.layers[1].block_sparse_moe
    kind, own, calls = type(last), type(last).forward, []

    def every_other(self, x):
        if x.is_meta:  # of the plan
            return own(self, x)
        calls.append(self)
        return own(self, x) if self is calls[0] else x

    monkeypatch.setattr(kind, "forward", every_other)
    result = quantize(folder_of("granite_moe"), qep=False, output=tmp_path / "out")
    source, found = (
        load_file(d / "model.safetensors") for d in (folder_of("granite_moe"), tmp_path / "out")
    )
    assert len(result.dense) == 12
    for name in ("input_linear", "output_linear"):
        key = f"model.layers.{{}}.block_sparse_moe.{name}.weight"
        assert key.format(0) not in found
        assert torch.equal(found[key.format(1)], source[key.format(1)])


def test_a_packed_checkpoint_that_lacks_an_expert_is_refused(folder_of, tmp_path):
    out = tmp_path / "out"
    quantize(folder_of("olmoe"), RTN(4, 32), qep=False, output=out)
    state = load_file(out / "model.safetensors")
    gone = [name for name in state if ".experts.1.up_proj." in name and "layers.0" in name]
    assert len(gone) == 4
    for name in gone:
        del state[name]
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"experts\.1\.up_proj is missing"):
        load(out, "cpu")


def test_experts_whose_code_is_another_are_refused(monkeypatch):
    model = build("mixtral")
    kind = type(model.model.layers[0].mlp.experts)
    own = kind.forward.__wrapped__

    def doubled(self, *arguments):
        return 2 * own(self, *arguments)

    monkeypatch.setattr(kind.forward, "__wrapped__", doubled)
    with pytest.raises(ModelError, match="compute more than their layout says"):
        find_blocks(model)


def test_names_are_those_of_the_source_s_own_index(folder_of):
    for name, expected in {
        "mixtral": "model.layers.0.block_sparse_moe.experts.3.w3.weight",
        "jamba": "model.layers.1.feed_forward.experts.3.up_proj.weight",
        "nemotron_h": "backbone.layers.1.mixer.experts.3.up_proj.weight",
    }.items():
        checkpoint = Checkpoint.open(str(folder_of(name)))
        found = disk_names(load_model(checkpoint), checkpoint.files)
        assert expected in found.values()
    assert transformers.__version__


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_experts_are_the_same_where_nothing_that_batches_hold_fits_into_memory(
    folder_of, tmp_path, monkeypatch, name
):
    monkeypatch.setattr("optq.quantize.BATCH_TOKENS", 96)
    monkeypatch.setattr("optq.model.activations.SMALL", 1)
    plain = quantize(folder_of(name))
    away = quantize(folder_of(name), activation_memory=0)
    assert away.activations["files"] > 0 == plain.activations["files"]
    assert away.record.text() == plain.record.text()
    for one, other in zip(away.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
