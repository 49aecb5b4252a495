"""A run within a budget: the widths it chooses, what it writes, and how it goes on."""

import itertools
import json
import random
import re
import time

import pytest
import torch
import zoo
import zoo_configs as configs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import optq.probe
import optq.stages
from optq import GPTQ, Mixed, ModelConfig, Runner, load
from optq.budget import knapsack
from optq.cli import app
from optq.core.gptq import BEST
from optq.core.grid import BITS
from optq.errors import OutputError, SettingError
from optq.formats import detect
from optq.formats.describe import describe
from optq.model.checkpoint import Checkpoint
from optq.record import FILE, TIMES, RunRecord

ROWS = {row.name: row for row in zoo.ROWS}
CALIB = zoo.token_ids(4, 24)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return zoo.save(ROWS["llama_bfloat16"], tmp_path_factory.mktemp("budget") / "llama")


def run(folder, quantizer, out, **options):
    options = {"calib": CALIB, "qep": True} | options
    return Runner(ModelConfig(str(folder), "cpu"), quantizer, output=out, **options).run()


def weights(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def table(parts, seed=0):
    """Sizes and costs as they are: a bit more costs so much, and leaves a quarter of the error."""
    draw = random.Random(seed)
    sizes, costs = [], []
    for _ in range(parts):
        count, cost = draw.randint(1, 20) * 1000, draw.lognormvariate(0, 1)
        sizes.append({b: count * b // 8 + count // 64 for b in BITS})
        costs.append({b: cost * draw.uniform(0.9, 1.1) * 4.0 ** -(b - 2) for b in BITS})
    return sizes, costs


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed):
    sizes, costs = table(6, seed)
    sizes[0] = {b: sizes[0][b] for b in (4, 8)}  # the format holds no others
    most = int(sum(size[4] for size in sizes) * (0.7 + 0.1 * seed))
    every = [
        (sum(cost[b] for cost, b in zip(costs, widths, strict=True)), widths)
        for widths in itertools.product(*sizes)
        if sum(size[b] for size, b in zip(sizes, widths, strict=True)) <= most
    ]
    assert knapsack(sizes, costs, most) == list(min(every)[1])


def test_eighty_blocks_take_no_time():
    sizes, costs = table(80 * 4)
    most = int(sum(size[3] for size in sizes) * 1.08)
    start = time.process_time()
    widths = knapsack(sizes, costs, most)
    assert time.process_time() - start < 5
    taken = sum(size[b] for size, b in zip(sizes, widths, strict=True))
    assert 0.999 * most < taken <= most


def test_widths_share_the_order_of_the_sweep():
    """One problem serves all of them: see optq.probe."""
    assert len({BEST[wbits].actorder for wbits in BITS}) == 1


@pytest.mark.parametrize("wbits", [2, 8])
def test_both_ends_are_uniform_runs(llama, tmp_path, wbits):
    uniform = run(llama, GPTQ(wbits, 32), tmp_path / "uniform")
    end = run(llama, Mixed(uniform.bits_per_weight, groupsize=32), tmp_path / "end")
    assert {choice.wbits for choice in end.choices} == {wbits}
    first, second = weights(tmp_path / "uniform"), weights(tmp_path / "end")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_size_holds_all_that_the_files_have(llama, tmp_path, form):
    least, most = (
        size_of
        for wbits in (2, 4)
        if (run(llama, GPTQ.plain(wbits, 32), at := tmp_path / f"{wbits}", format=form), True)
        for size_of in [size(at)]
    )
    asked = (least + most) // 2
    result = run(llama, Mixed(size=asked, groupsize=32), tmp_path / "out", format=form)
    assert len({choice.wbits for choice in result.choices}) > 1
    assert result.bytes == sum(choice.bytes for choice in result.choices)
    more = {2: 1, 3: 1, 4: 4}  # bits to the next width: what is left would not do for any
    step = min(x.weights * more[x.wbits] / 8 for x in result.choices if x.wbits < 8)
    assert 0.99 * asked - 1.1 * step < size(tmp_path / "out") <= asked


def test_the_file_is_what_was_chosen_and_measured(llama, tmp_path):
    """Of one input all layers have one width; errors at it are near those of the run."""
    out = tmp_path / "out"
    result = run(llama, Mixed(3.6, groupsize=32), out, qep=False)
    assert 3.6 * 0.97 < result.bits_per_weight <= 3.6
    model = load(out, "cpu")
    for record in result.layers:
        assert torch.isfinite(model.get_submodule(record.name).weight).all()
    scheme, widths = detect(Checkpoint.open(str(out))), {}
    for choice in result.choices:
        widths |= dict.fromkeys(choice.layers, choice.wbits)
        assert {scheme.layer(name).wbits for name in choice.layers} == {choice.wbits}
        assert [*choice.errors] == [*choice.divergence] == [*BITS]
        assert sorted(choice.errors.values(), reverse=True) == [*choice.errors.values()]
    assert {record.name for record in result.layers} == widths.keys()
    ends = [sorted(name.rpartition(".")[2] for name in choice.layers) for choice in result.choices]
    assert ["k_proj", "q_proj", "v_proj"] in ends and ["gate_proj", "up_proj"] in ends
    first = result.choices[0]
    errors = [record for record in result.layers if record.name in first.layers]
    energy = sum(record.error / record.relative_error for record in errors)
    measured = sum(record.error for record in errors) / energy
    assert 0.6 * first.errors[first.wbits] < measured < 1.1 * first.errors[first.wbits]
    text = (out / FILE).read_text()
    assert RunRecord.read(out / FILE).choices == result.choices and "seconds" not in text
    assert json.loads(text)["method"] == "gptq"
    assert describe(Checkpoint.open(str(out)))["other_schemes"] == len({*widths.values()}) - 1


def test_transformers_reads_groups_of_several_widths(llama, tmp_path):
    out = tmp_path / "out"
    result = run(llama, Mixed(4.2, groupsize=32), None, format="compressed-tensors")
    assert len({choice.wbits for choice in result.choices}) > 1
    result.save(out)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == len({choice.wbits for choice in result.choices})
    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(theirs(CALIB).logits, result.model(CALIB).logits)


def test_experts_of_a_block_have_one_width(tmp_path):
    folder, said = tmp_path / "model", []
    zoo.save(zoo.Row("", configs.mixtral, "", ()), folder)
    result = run(folder, Mixed(3.9, groupsize=32), tmp_path / "out", notice=said.append)
    parts = [choice for choice in result.choices if ".experts." in choice.layers[0]]
    blocks = {re.match(r".*?\.\d+\.", record.name)[0] for record in result.layers}
    experts = {record.name for record in result.layers if ".experts." in record.name}
    assert len(parts) == len(blocks)
    assert {name for part in parts for name in part.layers} == experts
    if {2, 3} & {part.wbits for part in parts}:
        assert any("vLLM does not run experts of" in line for line in said)
    load(tmp_path / "out", "cpu")


class Cut(BaseException):
    """What ends a run."""


def test_a_run_that_was_cut_off_keeps_its_choice(llama, tmp_path, monkeypatch):
    mixed, out = Mixed(3.6, groupsize=32), tmp_path / "out"

    def progress(step):
        if step.layers and step.block == 1:
            raise Cut

    with pytest.raises(Cut):
        run(llama, mixed, out, progress=progress)
    with pytest.raises(OutputError, match=r"bits_per_weight was 3\.6 and is 3\.7"):
        run(llama, Mixed(3.7, groupsize=32), out)
    with monkeypatch.context() as patch:
        patch.setattr(optq.stages, "measured", lambda *_: pytest.fail("it is known already"))
        steps = []
        result = run(llama, mixed, out, progress=lambda step: steps.append(step.block))
    assert 0 not in steps
    whole = run(llama, mixed, tmp_path / "whole")
    assert whole.choices == result.choices
    for path in (tmp_path / "whole").iterdir():
        same = path.read_bytes() == (out / path.name).read_bytes()
        assert same or path.name == TIMES, path.name


def test_a_plan_says_what_the_budget_says(llama, tmp_path):
    def plan(quantizer):
        return Runner(ModelConfig(str(llama), "cpu"), quantizer, calib=CALIB).plan()

    planned, above, below = plan(Mixed(3.6, groupsize=32)), plan(GPTQ(3, 32)), plan(GPTQ(2, 32))
    assert 3.59 < planned.bits_per_weight <= 3.6
    assert below.packed_bytes < planned.packed_bytes < above.packed_bytes
    assert planned.seconds > below.seconds and planned.dense == above.dense
    assert any("a pass before the run" in line for line in planned.notices)


@pytest.mark.parametrize(
    ("mixed", "cause", "ends"),
    [
        ({"bits_per_weight": 1.5}, "--bits-per-weight 1.5 is below", r"from 3\.\d\d to 9\.\d\d"),
        ({"bits_per_weight": 16}, "--bits-per-weight 16 is above", r"from 3\.\d\d to 9\.\d\d"),
        ({"size": 2 * 10**4}, "--size 0.02MB is below", r"from 0\.\dMB to 0\.\dMB"),
        ({"size": 10**9}, "--size 1000MB is above", r"from 0\.\dMB to 0\.\dMB"),
    ],
)
def test_a_budget_that_no_choice_meets(llama, tmp_path, mixed, cause, ends):
    """Both ends are said, before any text is read; what is said then works."""
    with pytest.raises(SettingError, match=cause) as error:
        run(llama, Mixed(groupsize=32, **mixed), tmp_path / "out", calib="no such text")
    assert re.search(ends, error.value.remedy), error.value.remedy
    assert [*tmp_path.iterdir()] == []
    if "bits_per_weight" in mixed:
        for end in re.findall(r"\d+\.\d+", error.value.remedy):
            Runner(ModelConfig(str(llama), "cpu"), Mixed(float(end), groupsize=32)).plan()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits_per_weight": 3, "size": 10**6},
        {"bits_per_weight": 0},
        {"bits_per_weight": float("nan")},
        {"bits_per_weight": 3, "groupsize": 0},
        {"size": True},
        {"size": "4GB"},
    ],
)
def test_budgets_that_are_none(options):
    with pytest.raises(SettingError):
        Mixed(**options)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("--bits-per-weight 3.6 --size 1MB", "two budgets"),
        ("--bits-per-weight 3.6 --wbits 4", "a run within a budget has no --wbits"),
        ("--size 1MB --method rtn", "--method rtn has no --size"),
        ("--bits-per-weight 3.6 --method obq", "--method obq has no --bits-per-weight"),
        ("--size large", "--size large is no size"),
    ],
)
def test_the_command_refuses(llama, tmp_path, words, cause):
    command = ["quantize", str(llama), str(tmp_path / "out"), *words.split()]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, SettingError) and cause in error.cause
    assert [*tmp_path.iterdir()] == []


def test_the_command_tells_who_got_what(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the rest of the other is on. " * 40)
    options = ["--calib", str(text), "--nsamples", "4", "--seqlen", "24", "--groupsize", "32"]
    options += ["--bits-per-weight", "3.6", "--device", "cpu"]
    asked = ["quantize", str(llama), str(tmp_path / "out"), *options]
    done = CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert told["wbits"] is None and told["qep"] and told["bits_per_weight"] <= 3.6
    kinds = {"layers", "weights", "wbits", "bytes", "errors", "divergence", "sensitivity"}
    assert all(choice.keys() == kinds for choice in told["choices"])
    done = CliRunner().invoke(app, [*asked, "--force"], catch_exceptions=False)
    assert "self_attn.q_proj, k_proj, v_proj" in done.stdout and "sensitivity" in done.stdout
    done = CliRunner().invoke(app, [*asked, "--force", "--dry-run"], catch_exceptions=False)
    assert "3.60 bits each" in done.stdout


def test_compare_takes_budgets(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the rest of the other is on. " * 40)
    options = ["--calib", str(text), "--text", str(text), "--nsamples", "4", "--seqlen", "24"]
    options += ["--methods", "rtn", "--wbits", "3", "--groupsize", "32", "--device", "cpu"]
    options += ["--bits-per-weight", "3.6,4", "--results", str(tmp_path / "rows.jsonl"), "--json"]
    done = CliRunner().invoke(app, ["compare", str(llama), *options], catch_exceptions=False)
    rows = json.loads(done.stdout)["rows"]
    named = [(row["method"], row["wbits"]) for row in rows]
    assert named == [("none", 16), ("rtn", 3), ("budget", 3.6), ("budget", 4.0)]
    assert rows[2]["bits_per_weight"] <= 3.6 and rows[3]["bits_per_weight"] <= 4
