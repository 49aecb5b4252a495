"""A plan before the work: what it says is what a run then does, and it reads no weight."""

import json
import shutil
import struct
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import transformers
import zoo
import zoo_configs as configs
from typer.testing import CliRunner

import optq.plan
from optq import GPTQ, RTN, ModelConfig, Runner
from optq.cli import app
from optq.distill import Distill
from optq.errors import ModelError, OutputError
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.dense import EMBEDDING, GATE, HEAD, SKIPPED, TIED, UNLOADED
from optq.model.experts import is_bank
from optq.model.scout import scout
from optq.tune import Tune

TOKENS = torch.randint(4, 124, (2, 32), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, config, dtype=torch.bfloat16, shards="5GB") -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def without_values(folder: Path) -> Path:
    """Cut everything but the headers off the files."""
    for path in folder.glob("*.safetensors"):
        whole = path.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        path.write_bytes(whole[: 8 + length])
    return folder


def runner(folder: Path, out: Path, quantizer, **options) -> Runner:
    return Runner(ModelConfig(str(folder), "cpu"), quantizer, calib=TOKENS, output=out, **options)


CASES = {
    "llama": (configs.llama(), GPTQ.plain(4, 32), {"format": "gptq"}),
    "tied": (configs.llama_tied(), GPTQ.plain(3, -1), {"format": "gptq_v2"}),
    "asymmetric": (configs.llama(), RTN(2, 64, sym=False), {"format": "compressed-tensors"}),
    "gpt2": (configs.gpt2(), RTN(8, 32), {"format": "gptq"}),
    "skip": (configs.llama(), RTN(4, 32), {"skip": "down_proj", "qep": True}),
    "experts": (configs.qwen3_moe(), RTN(4, 32), {"format": "compressed-tensors"}),
    "experts, skipped": (configs.mixtral(), RTN(4, 32), {"skip": "experts"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_the_run(name, tmp_path):
    config, quantizer, options = CASES[name]
    folder, out = saved(tmp_path / "model", config), tmp_path / "out"
    own = runner(folder, out, quantizer, **options)
    plan = own.plan()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing is written
    result = own.run()
    assert plan.packed_bytes == result.bytes
    assert plan.bits_per_weight == pytest.approx(result.bits_per_weight)
    assert plan.layers == len(result.layers)
    layout = Checkpoint.open(str(out)).layout
    assert plan.bytes == sum(tensor.nbytes for tensor in layout.values())
    size = sum(path.stat().st_size for path in out.iterdir())
    assert size <= plan.disk <= 2.2 * size + 2**16  # a small model is written twice


def test_headers_are_enough(tmp_path):
    folder, out = saved(tmp_path / "model", configs.llama(), shards="100kB"), tmp_path / "out"
    before = runner(folder, out, RTN(4, 32)).plan()
    without_values(folder)
    plan = runner(folder, out, RTN(4, 32)).plan()
    (cut,) = {*plan.notices} - {*before.notices}
    assert "shorter than its header says" in cut
    assert (plan.bytes, plan.sites, plan.disk) == (before.bytes, before.sites, before.disk)
    with pytest.raises(ModelError, match="truncated or corrupt"):
        runner(folder, out, RTN(4, 32)).run()


def test_what_stays_dense_and_why(tmp_path):
    folder = saved(tmp_path / "model", configs.qwen3_moe())
    plan = runner(folder, tmp_path / "out", RTN(4, 32), skip="o_proj").plan()
    found = {row.why: row for row in plan.dense}
    assert found[GATE].names == ["model.layers.*.mlp.gate.weight"]
    assert found[SKIPPED].names == ["model.layers.*.self_attn.o_proj.weight"]
    assert found[HEAD].names == ["lm_head.weight"]
    assert found[EMBEDDING].names == ["model.embed_tokens.weight"]
    assert sum(row.bytes for row in plan.dense) == plan.dense_bytes
    folder = saved(tmp_path / "tied", configs.llama_tied())
    (tied,) = [row for row in runner(folder, None, RTN(4, 32)).plan().dense if row.why == TIED]
    assert tied.tensors == 1


@pytest.mark.parametrize("row", zoo.ROWS, ids=lambda row: row.name)
def test_sites_are_found_without_values(row):
    model = row.build()
    with torch.device("meta"):
        skeleton = type(model)(model.config).eval()
    blocks = find_blocks(skeleton)
    found, held = scout(skeleton, blocks, 32)
    for block in blocks:
        start = f"{block.name}."
        sites = [tuple(x.name.removeprefix(start) for x in site.layers) for site in found[block]]
        assert tuple(sites) == row.sites_of(block.index)
    assert 0 < held.between <= held.paused <= held.running
    assert not any("forward" in vars(block.module) for block in blocks)


def test_a_model_that_asks_for_values_is_planned_without_sites(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", configs.llama())

    def forward(self, hidden, *args, **kwargs):
        return hidden[hidden.sum(-1).tolist()]

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    plan = runner(folder, tmp_path / "out", RTN(4, 32)).plan()
    assert plan.sites is None and plan.layers == 21
    assert any("its sites are found in the run" in line for line in plan.notices)


def test_a_disk_without_room_is_known_before_the_work(tmp_path, monkeypatch):
    folder, out = saved(tmp_path / "model", configs.llama()), tmp_path / "out"
    own = runner(folder, out, RTN(4, 32))
    plan = own.plan()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, plan.disk - 1))
    own.calib = "no-such-text.txt"  # which is not looked for
    with pytest.raises(OutputError) as refusal:
        own.run()
    needed = refusal.value.cause.partition(", and ")[0]
    assert needed == f"the checkpoint needs {plan.disk / 1000:.0f} kB"
    assert str(out) in refusal.value.cause and "make room" in refusal.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    own.calib = TOKENS
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, plan.disk))
    own.run()


def test_memory_that_will_not_do_is_told(tmp_path, monkeypatch):
    folder, said = saved(tmp_path / "model", configs.llama()), []
    own = runner(folder, tmp_path / "out", RTN(4, 32), notice=said.append)
    monkeypatch.setattr("optq.plan.free", lambda device: -(2**33))
    own.run()
    assert [line for line in said if "of main memory, and" in line]


def test_the_command(tmp_path, monkeypatch):
    folder, out = saved(tmp_path / "model", configs.llama()), tmp_path / "out"
    words = ["quantize", str(folder), str(out), "--dry-run", "--nsamples", "2", "--seqlen", "32"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "next: the same command without --dry-run" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert told["groupsize"] == 64 and told["layers"] == 21 and told["sites"] == 12
    assert told["bytes"] == told["packed_bytes"] + told["dense_bytes"]
    assert any("no tokenizer" in line for line in told["notices"])
    assert not out.exists()
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "optq", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2 and f"{out} exists" in done.stderr


def deepseek(folder: Path) -> Path:
    """DeepSeek-V3 as published, but in bfloat16, and with headers only."""
    hidden, inner, vocabulary, experts, blocks = 7168, 2048, 129280, 256, 61
    sizes = {"hidden_size": hidden, "moe_intermediate_size": inner, "vocab_size": vocabulary}
    config = transformers.DeepseekV3Config(**sizes, num_hidden_layers=blocks, dtype="bfloat16")
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(folder)

    def mlp(name: str, width: int) -> dict[str, tuple[int, ...]]:
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        return {f"{name}.{part}_proj.weight": shape for part, shape in shapes.items()}

    embeddings = (vocabulary, hidden)
    parts = [{"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}]
    parts[0]["model.norm.weight"] = (hidden,)
    for index in range(blocks + 1):
        block = {
            **{"q_a_proj": (1536, hidden), "q_b_proj": (24576, 1536), "o_proj": (hidden, 16384)},
            **{"kv_a_proj_with_mqa": (576, hidden), "kv_b_proj": (32768, 512)},
            **{"q_a_layernorm": (1536,), "kv_a_layernorm": (512,)},
        }
        start = f"model.layers.{index}"
        part = {f"{start}.self_attn.{name}.weight": shape for name, shape in block.items()}
        norms = "input_layernorm", "post_attention_layernorm"
        part |= {f"{start}.{name}.weight": (hidden,) for name in norms}
        if index < 3:
            part |= mlp(f"{start}.mlp", 18432)
        else:
            part |= {f"{start}.mlp.gate.weight": (experts, hidden)}
            part |= {f"{start}.mlp.gate.e_score_correction_bias": (experts,)}
            part |= mlp(f"{start}.mlp.shared_experts", inner)
            for expert in range(experts):
                part |= mlp(f"{start}.mlp.experts.{expert}", inner)
        if index == blocks:  # for multi-token prediction
            part |= {f"{start}.{name}.weight": (hidden,) for name in ("enorm", "hnorm")}
            part |= {f"{start}.eh_proj.weight": (hidden, 2 * hidden)}
            part |= {f"{start}.shared_head.head.weight": embeddings}
        parts.append(part)
    where = {}
    for index, part in enumerate(parts):
        header, end = {}, 0
        for name, shape in part.items():
            kind, width = ("F32", 4) if name.endswith("bias") else ("BF16", 2)
            size = width * torch.Size(shape).numel()
            entry = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
            header[name], end = entry, end + size
        file = f"model-{index:05}.safetensors"
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_a_model_of_671_billion_weights(tmp_path):
    folder, start = deepseek(tmp_path / "model"), time.process_time()
    plan = Runner(
        ModelConfig(str(folder), "cpu"), GPTQ(4, 128), qep=True, output=tmp_path / "out"
    ).plan()
    assert time.process_time() - start < 30  # in seconds of one core: the machine may be busy
    assert (plan.blocks, plan.experts) == (61, 58 * 256)
    assert plan.layers == 61 * 5 + 3 * 3 + 58 * 3 * 257
    assert plan.sites == 61 * 4 + 3 * 2 + 58 * 4
    (unloaded,) = [row for row in plan.dense if row.why == UNLOADED]
    assert all(name.startswith("model.layers.*.") for name in unloaded.names)
    assert 320e9 < plan.packed_bytes < 360e9 and plan.weights > 650e9
    with pytest.raises(OutputError, match="the checkpoint needs"):
        plan.check(tmp_path / "out")


def test_experts_are_tried_on_few_weights():
    with torch.device("meta"):
        config = configs.qwen3_moe()
        config.num_experts = 300
        model = transformers.Qwen3MoeForCausalLM(config)
    (module, *_) = [module for module in model.modules() if is_bank(module)]
    (block, *_) = find_blocks(model)
    small = block.banks[0]._small(torch.Generator().manual_seed(0))
    assert len(small.down_proj) == len(module.down_proj) == 300
    assert len(small.down_proj.unique(dim=0)) < 40


def test_tuning_the_scales_is_in_the_plan(tmp_path, monkeypatch):
    """Its memory, its time, and the packed tensors once more beside those of the journal."""
    monkeypatch.setattr(optq.plan, "resident", lambda: 0)  # which grows between two plans
    folder, out = saved(tmp_path / "model", configs.llama()), tmp_path / "out"
    plain, tuned = (
        runner(folder, out, GPTQ(4, 32), tune=tune).plan() for tune in (None, Tune(None, Distill()))
    )
    assert tuned.seconds > plain.seconds and tuned.memory >= plain.memory
    assert tuned.packed_bytes == plain.packed_bytes
    assert tuned.disk >= plain.disk >= 2 * plain.packed_bytes
    short, long = (
        runner(folder, out, GPTQ(4, 32), tune=Tune(None, Distill(n))).plan() for n in (10, 100)
    )
    assert long.seconds > short.seconds
