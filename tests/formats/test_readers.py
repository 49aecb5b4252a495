"""Who loads a checkpoint: a table of tiny ones; what is said of transformers is tried in it."""

import json
import re
from pathlib import Path

import low_float
import pytest
import torch
import zoo
import zoo_configs as configs
from formats.test_gguf import byte_level, model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from optq import GPTQ, RTN, ModelConfig, Runner, load
from optq.budget import Mixed
from optq.errors import OptqError
from optq.formats import detect, reader
from optq.formats.gguf import export_gguf
from optq.formats.readers import TOOLS, who_loads
from optq.model.checkpoint import Checkpoint
from optq.model.linear import make_dense

FIXTURES = Path(__file__).parents[1] / "fixtures"
IDS = zoo.token_ids(4, 24)
CT = "compressed-tensors"
ROWS = {row.name: row for row in zoo.ROWS}
YES, NO, UNKNOWN = True, False, None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Quantize a model of the table, or one of those that GGUF knows, by its name."""

    def make(source, quantizer, form="gptq", **options):
        folder = tmp_path_factory.mktemp("readers")
        row = ROWS.get(source) or zoo.Row(source, getattr(configs, source, None), "", ())
        if source in GGUF:
            GGUF[source]().save_pretrained(folder / "model")
            byte_level().save_pretrained(folder / "model")
        else:
            zoo.save(row, folder / "model")
        config = ModelConfig(str(folder / "model"), "cpu")
        options |= {"calib": IDS, "format": form, "output": folder / "out"}
        Runner(config, quantizer, **options).run()
        return folder / "out"

    return make


GGUF = {"wide": lambda: model("Llama"), "sparse": lambda: model("Mixtral", **LOCAL)}
LOCAL = {"num_experts_per_tok": 2, "intermediate_size": 128, "num_local_experts": 4}


def answers(folder):
    readers = who_loads(Checkpoint.open(str(folder)))
    assert tuple(reader.tool for reader in readers) == TOOLS
    assert all(reader.why and "\n" not in reader.why for reader in readers)
    return {reader.tool: reader for reader in readers}


def loaded(folder, why):
    """Whether transformers, asked as ``why`` says, makes the same logits of it as OPTQ."""
    how = {}
    if "CompressedTensorsConfig(dequantize=True)" in why:
        how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        theirs, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **how
        )
    except (RuntimeError, ValueError):
        return False
    if any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")):
        return False
    ours, ids = load(folder, "cpu"), torch.arange(16)[None]
    make_dense(ours)
    with torch.no_grad():
        found, wanted = (each(input_ids=ids, use_cache=False).logits for each in (theirs, ours))
    return bool((found - wanted).norm() < 1e-4 * wanted.norm())


FEW = "takes 4 and 8 bits, symmetric, from gptq, not"
ALIKE = "wants q_proj, k_proj, v_proj quantized alike"
TABLE = [
    # model, quantizer, format, options, and what transformers, vLLM, SGLang and llama.cpp do
    ("wide", RTN(4, 32), "gptq", {}, (YES, YES, YES, YES)),
    ("wide", RTN(8, 128), "gptq_v2", {}, (YES, YES, YES, YES)),
    ("wide", RTN(3, 32), "gptq", {}, (YES, (NO, f"{FEW} 3 bits; `optq export"), YES, YES)),
    ("wide", RTN(4, 64, False), "gptq", {}, (YES, (NO, f"{FEW} 4 bits asymm"), YES, YES)),
    ("wide", RTN(4, 32), CT, {}, (YES, YES, YES, YES)),
    ("wide", RTN(2, 32), CT, {}, (YES, (YES, ", on CPUs 4 alone"), (NO, "8 bits .* not 2"), YES)),
    ("wide", RTN(4, 32, False), CT, {}, (YES, YES, (YES, "zero points"), YES)),
    ("wide", RTN(8, -1, False), CT, {}, (YES, YES, YES, (NO, "asymmetric at 8 bits"))),
    ("wide", RTN(4, 16), CT, {}, (YES, (YES, "groups of 16"), YES, (NO, "no multiple of 32"))),
    (
        "wide",
        GPTQ.plain(4, 32, actorder=True),
        "gptq",
        {},
        (YES, (NO, "act-order"), YES, (NO, "order of quantization")),
    ),
    ("wide", GPTQ.plain(4, -1, actorder=True), "gptq", {}, (YES, YES, YES, YES)),
    ("wide", RTN(4, 32), "gptq", {"skip": "v_proj"}, (YES, (NO, ALIKE), (NO, ALIKE), YES)),
    ("wide", RTN(4, 32), "gptq", {"skip": "gate_proj"}, (YES, (NO, "gate"), (NO, "up"), YES)),
    ("wide", RTN(4, 32), "gptq", {"skip": "o_proj|down_proj"}, (YES, YES, YES, YES)),
    ("wide", RTN(4, 32), "gptq", {"skip": r"layers\.0"}, ((UNKNOWN, "dense"), YES, YES, YES)),
    ("wide", RTN(4, 32), CT, {"skip": r"layers\.0"}, (YES, YES, YES, YES)),
    ("wide", RTN(4, 32), "gptq", {"head": 8}, ((NO, "packed head"), YES, YES, YES)),
    ("wide", RTN(4, 32), CT, {"head": 8}, (YES, YES, (UNKNOWN, "packed head"), YES)),
    ("gpt2", RTN(4, 32), "gptq", {}, (YES, (UNKNOWN, "Conv1D"), (UNKNOWN, "Conv1D"), NO)),
    ("sparse", RTN(4, 32), "gptq", {}, ((NO, "experts"), YES, YES, YES)),
    ("sparse", RTN(4, 32), CT, {}, (YES, (YES, "bits"), YES, YES)),
    ("sparse", RTN(3, 32), CT, {}, (YES, (NO, "4 or 8"), (NO, "4 or 8"), YES)),
    (
        "sparse",
        RTN(4, 32, sym=False),
        CT,
        {},
        ((NO, "only if symmetric"), (NO, "--sym"), (NO, "--sym"), YES),
    ),
    ("sparse", RTN(4, 32), CT, {"skip": "experts"}, ((NO, "no expert left"), YES, YES, YES)),
    ("mixtral", RTN(4, 32), CT, {}, (YES, (YES, "without its fast kernel"), YES, NO)),
    ("llama4", RTN(4, 32), CT, {}, (YES, YES, YES, (NO, "nobody has compared"))),
    ("gpt_oss", RTN(4, 32), CT, {}, ((NO, "OPTQ alone"), (NO, "single"), (NO, "single"), NO)),
    ("granite_moe", RTN(4, 32), CT, {}, ((NO, "vLLM and OPTQ"), YES, YES, NO)),
]


@pytest.mark.parametrize(
    ("source", "quantizer", "form", "options", "expected"),
    TABLE,
    ids=[f"{row[0]}-{row[1].wbits}-{row[2]}-{index}" for index, row in enumerate(TABLE)],
)
def test_the_table(made, source, quantizer, form, options, expected):
    folder = made(source, quantizer, form, **options)
    found = answers(folder)
    for tool, each in zip(TOOLS, expected, strict=True):
        loads, why = each if isinstance(each, tuple) else (each, "")
        assert found[tool].loads is loads, found[tool]
        assert re.search(why, found[tool].why), found[tool]
    if form == CT:
        assert loaded(folder, found["transformers"].why) is found["transformers"].loads
    if found["llama.cpp"].loads is not None:  # what is said is what the export does
        assert exports(folder) is found["llama.cpp"].loads


def exports(folder):
    try:
        export_gguf(Checkpoint.open(str(folder)), folder.parent / "out.gguf")
    except OptqError:
        return False
    return True


OTHERS = {
    "gptqmodel/gptq_4bit": (YES, YES, YES),
    "gptqmodel/gptq_4bit_desc_act": (YES, NO, YES),
    "gptqmodel/gptq_3bit_channel": (YES, NO, YES),
    "gptqmodel/gptq_8bit_qwen2": (YES, YES, YES),
    "gptqmodel/gptq_v2_4bit_asym": (YES, NO, YES),
    "gptqmodel/gptq_dynamic": (UNKNOWN, NO, NO),  # v_proj is dense
    "llmcompressor/w4a16_g32": (YES, NO, NO),  # v_proj is dense
    "llmcompressor/w4a16_g32_static": (YES, YES, YES),
    "llmcompressor/w4a16_asym_g32": (YES, YES, YES),
    "llmcompressor/w8a16_channel": (YES, YES, YES),
    "llmcompressor/mixed": (NO, YES, NO),
}


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoints_of_other_tools(name):
    found = answers(FIXTURES / name)
    assert tuple(found[tool].loads for tool in TOOLS[:3]) == OTHERS[name]
    if name.startswith("llm"):
        assert loaded(FIXTURES / name, found["transformers"].why) is OTHERS[name][0]


@pytest.mark.parametrize("form", ["gptq", CT])
def test_widths_within_a_budget(made, form):
    folder = made("wide", Mixed(bits_per_weight=3.6, groupsize=32), form)
    found = answers(folder)
    servers = [NO, UNKNOWN] if form == "gptq" else [YES, NO]
    assert [found[tool].loads for tool in TOOLS[1:3]] == servers
    assert found["transformers"].loads is (UNKNOWN if form == "gptq" else YES)
    assert form == "gptq" or loaded(folder, "")


def test_experts_beside_layers_of_other_widths(made):
    """transformers reads all experts with one of the groups: theirs comes first."""
    folder = made("sparse", Mixed(bits_per_weight=3.6, groupsize=32), CT)
    checkpoint = Checkpoint.open(str(folder))
    layer = detect(checkpoint).layer
    experts = {layer(name) for name in reader.quantized_layers(checkpoint) if "experts" in name}
    assert len(experts) == 1 and layer("model.layers.0.self_attn.q_proj") not in experts
    assert answers(folder)["transformers"].loads and loaded(folder, "")
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    config["quantization_config"]["config_groups"] = dict(reversed(groups.items()))
    (folder / "config.json").write_text(json.dumps(config))
    assert answers(folder)["transformers"].why == "takes another of the config groups for experts"
    assert not loaded(folder, "")


def test_models_that_are_not_quantized(tmp_path):
    for name, known in (("llama", YES), ("gemma2", UNKNOWN)):
        folder = zoo.save(ROWS[name], tmp_path / name)
        assert [each.loads for each in answers(folder).values()] == [YES, YES, YES, known]
    folder = zoo.save(ROWS["qwen3"], tmp_path / "fp8")
    low_float.code(folder, low_float.FP8, low_float.in_blocks, lambda name: "_proj.w" in name)
    readers = who_loads(ModelConfig(str(folder)).checkpoint())
    assert [each.loads for each in readers] == [YES, UNKNOWN, UNKNOWN, UNKNOWN]
    assert "dequantize=True" in readers[0].why


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"quant_method": "awq"}, "quantized with awq"),
        ({"quant_method": CT, "format": "nvfp4-pack-quantized"}, "kept as nvfp4"),
    ],
)
def test_methods_of_which_nothing_is_known(tmp_path, settings, cause):
    folder = zoo.save(ROWS["llama"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for each in answers(folder).values():
        assert each.loads is None and cause in each.why


def test_a_model_that_is_no_language_model(tmp_path):
    folder = zoo.save(next(row for row in zoo.REFUSED if row.name == "bert"), tmp_path / "bert")
    assert {each.loads for each in answers(folder).values()} == {None}
