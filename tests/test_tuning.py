"""Block tuning: what it changes, what it keeps, what it refuses, and a run that is cut off."""

import copy
from dataclasses import replace

import decoder
import numpy as np
import pytest
import torch
import zoo
import zoo_configs as configs
from records import known
from test_distill import ROWS, SAME, TWO_BITS, solved
from test_resume import Cut, contents

import optq.plan
import optq.tune
import optq.tuning
from optq import GPTQ, RTN, Mixed, ModelConfig, Runner
from optq.core.grid import Storage
from optq.core.weight import QuantizedWeight, group_index
from optq.errors import DataError, ModelError, SettingError
from optq.formats.describe import describe
from optq.model.batch import Passed
from optq.model.blocks import Block, find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.layer import Layer
from optq.record import RunRecord
from optq.report.page import build
from optq.report.page.known import Several
from optq.tune import Tune
from optq.tuning import Tuning, _Moving, held_back

FEW = Tuning(steps=16, reach=1.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama of three blocks, in bfloat16. To be read only."""
    return zoo.save(ROWS["llama_bfloat16"], tmp_path_factory.mktemp("tuning") / "llama")


@pytest.fixture
def run(source, tmp_path):
    def made(tuning=FEW, folder=source, at="out", **options):
        options = {"calib": SAME, "output": at and tmp_path / at} | options
        tune = tuning and Tune(tuning)
        return Runner(ModelConfig(str(folder), "cpu"), TWO_BITS, tune=tune, **options).run()

    return made


def random_weight(rows, columns, width, wbits, scattered=False):
    group = group_index(columns, width, torch.device("cpu"))
    if scattered:
        group = group[torch.randperm(columns)]
    groups = int(group.max()) + 1
    codes = torch.randint(2**wbits, (rows, columns), dtype=torch.uint8)
    zeros = torch.randint(2**wbits, (rows, groups), dtype=torch.uint8)
    return QuantizedWeight(wbits, codes, torch.rand(rows, groups).double() + 0.5, zeros, group)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("width", [4, 5])  # 5: the last group has fewer columns
def test_gradients_are_those_of_the_straight_through_estimator(width, scattered):
    weight = random_weight(6, 12, width, 3, scattered)
    module = torch.nn.Linear(12, 6, bias=False, dtype=torch.float64)
    moving = _Moving(Layer("x", module, False), weight)
    moving.units += 0.3 * torch.randn_like(moving.units)
    moving.put(Storage(()))
    gradient = torch.randn(6, 12, dtype=torch.float64)
    moving.learn(gradient)

    group = weight.g_idx.long()
    units = moving.units.view(6, 12).clone().requires_grad_()
    moved = torch.zeros_like(weight.scales, requires_grad=True)
    through = units + (units.round() - units).detach()
    made = through * (weight.scales * moved.exp())[:, group]
    assert torch.equal(module.weight, made)
    made.backward(gradient)
    torch.testing.assert_close(moving.units.grad.view(6, 12), units.grad)
    torch.testing.assert_close(moving.moved.grad, moved.grad)
    assert torch.equal(moving.now().weight, made)


def test_codes_stay_in_range_and_the_untouched_weight_is_the_same():
    weight = random_weight(4, 8, 4, 2)
    module = torch.nn.Linear(8, 4, bias=False, dtype=torch.float64)
    moving = _Moving(Layer("x", module, False), weight)
    moving.put(Storage(()))
    assert torch.equal(module.weight, weight.weight)
    assert torch.equal(moving.now().codes, weight.codes)
    for push, code in ((1e3, 3), (-1e3, 0)):
        moving.units += push
        moving.put(Storage(()))
        assert (moving.now().codes == code).all()


def test_the_error_is_that_of_the_metric():
    """A block of one layer, against its formula; and an optimum that is known is found."""
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 4, bias=False)
    layer, x = Layer("x", module, False), torch.randn(8, 1, 5, 8)
    root = torch.randn(4, 4)
    metric = root @ root.T
    weight = random_weight(4, 8, 4, 3)
    weight = optq.tuning.replace(weight, scales=weight.scales.float())
    codes = weight.codes.clone()
    codes[0, 0] ^= 1  # one code off by one, and one scale by a tenth
    off = optq.tuning.replace(weight, codes=codes, scales=weight.scales.clone())
    off.scales[1, 1] *= 1.1
    wanted = [Passed((each,), {}, each @ weight.weight.T, True) for each in x]
    own = [Passed((each,), {}, each @ off.weight.T, True) for each in x]
    layer.put(off.weight)
    block = Block(0, "block", module, [layer], ["x"])
    settings = Tuning(steps=300, reach=16.0)
    storage = Storage(())
    pairs = list(zip(own, wanted, strict=True))
    best, record = optq.tuning.tune(block, {layer: off}, pairs, metric, storage, settings)
    error = own[7].made - wanted[7].made
    ridge = optq.tuning.RIDGE * metric.diagonal().mean() * torch.eye(4)
    expected = ((error @ (metric + ridge)) * error).sum(-1).mean().item()
    assert record.before == pytest.approx(expected, rel=1e-5)
    assert record.kept and record.after < 0.05 * record.before
    assert torch.equal(best[layer].codes, weight.codes)
    assert record.moved == 1 / 32
    assert torch.equal(module.weight, best[layer].weight)
    assert not module.weight.requires_grad or module.weight.grad is None


def test_blocks_of_the_bundled_model_get_better():
    config, told = ModelConfig("demo", "cpu"), []
    options = {"nsamples": 16, "seqlen": 128}
    tune = Tune(Tuning(steps=30, tokens=256))
    result = Runner(config, TWO_BITS, tune=tune, progress=told.append, **options).run()
    tuned = result.record.tuned
    assert [each.block for each in tuned] == [f"model.layers.{i}" for i in range(4)]
    assert all(each.kept and each.after < each.before for each in tuned), tuned
    assert tuned[0].after < 0.96 * tuned[0].before, tuned
    assert all(each.steps == 30 and not each.note for each in tuned)
    assert [step.tuned for step in told if step.tuned] == tuned
    assert "tune" in result.seconds


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_codes_and_scales_change_and_nothing_else(run, tmp_path, form):
    run(format=form)
    run(None, at="before", format=form)
    new, old = (dict(solved(tmp_path / at)) for at in ("out", "before"))
    assert new.keys() == old.keys()
    assert sum(int((new[name].codes != old[name].codes).sum()) for name in new) > 100
    assert any(not torch.equal(new[name].scales, old[name].scales) for name in new)
    for name, weight in new.items():
        assert torch.equal(weight.zeros, old[name].zeros)
        assert torch.equal(weight.g_idx, old[name].g_idx)
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(weight.scales.to(dtype).float(), weight.scales)
    record, before = (RunRecord.read(tmp_path / at / "optq.json") for at in ("out", "before"))
    assert len(record.tuned) == 3 and all(each.kept for each in record.tuned)
    assert before.tuned == []
    told, plain = (describe(Checkpoint.open(str(tmp_path / at))) for at in ("out", "before"))
    assert told["tuned"] == "blocks; errors of layers are from before" and "tuned" not in plain
    for made, is_told in ((record, True), (before, False)):
        page = build.page(Several([known("tuned", made)]))
        assert ("before blocks were tuned" in page) == is_told


@pytest.mark.parametrize("name", ["llama_bfloat16", "qwen3_moe", "llama4", "gpt2", "gemma2"])
def test_what_is_written_is_what_was_measured(run, tmp_path, name):
    row = ROWS.get(name) or zoo.Row(name, getattr(configs, name), "", ())
    folder = tmp_path / "model"
    row.build().save_pretrained(folder)
    written, kept = run(folder=folder), run(folder=folder, at=None)
    assert written.record.tuned == kept.record.tuned
    assert any(each.kept for each in kept.record.tuned)
    kept.save(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "out")
    layers = {layer.name: layer for block in find_blocks(kept.model) for layer in block.layers}
    stored = dict(decoder.decode(tmp_path / "out"))
    for layer in layers.keys() & stored.keys():
        found = layers[layer].weight
        expected = torch.from_numpy(np.ascontiguousarray(stored[layer])).to(found.dtype)
        assert torch.equal(found, expected)
    assert layers.keys() & stored.keys() or name == "gpt2"  # whose names on disk are shorter


def test_the_same_seed_gives_the_same_bytes(run, tmp_path):
    run(qep=True)
    run(qep=True, at="again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize(("wbits", "steps"), [(2, 10), (3, 6), (4, 6)])
def test_blocks_without_two_bits_take_fewer_steps(source, wbits, steps):
    quantizer, tune = replace(TWO_BITS, wbits=wbits), Tune(Tuning(steps=10))
    result = Runner(ModelConfig(str(source), "cpu"), quantizer, tune=tune, calib=SAME).run()
    assert [each.steps for each in result.record.tuned] == [steps] * 3


def test_a_block_stays_where_nothing_is_gained(run, tmp_path):
    """On samples that no step sees; here at rates that can only do harm."""
    calib = zoo.token_ids(8, 24)
    result = run(Tuning(steps=8, reach=200.0, scales=5.0), calib=calib)
    run(None, at="before", calib=calib)
    for each in result.record.tuned:
        assert not each.kept and each.after == each.before and each.moved == 0
    weights = [(tmp_path / at / "model.safetensors").read_bytes() for at in ("out", "before")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("step", [1, 6])
def test_an_error_that_is_not_finite(run, monkeypatch, step):
    """Ends it; the best before stays, and the record says so."""
    own, learned = optq.tuning._error, []

    def broken(block, metric, pair):
        made = own(block, metric, pair)
        if torch.is_grad_enabled():
            learned.append(block)
            if sum(each is block for each in learned) == step:
                return made * float("nan")
        return made

    monkeypatch.setattr(optq.tuning, "_error", broken)
    result = run(Tuning(steps=8, looks=8, reach=0.5), at=None)
    for each in result.record.tuned:
        assert each.steps == step - 1 and f"step {step}" in each.note
        assert each.kept is (step > 1)
    assert all(p.isfinite().all() for p in result.model.parameters())


def test_a_block_that_changes_what_it_is_called_with():
    module = torch.nn.Linear(4, 4)
    layer, passed = (
        Layer("x", module, False),
        Passed((torch.ones(1, 4),), {}, torch.ones(1, 4), True),
    )
    pair = optq.tuning.replace(passed, whole=False), passed
    with pytest.raises(ModelError, match=r"block changes what it is called with\n.*--tune"):
        block = Block(0, "block", module, [layer], ["x"])
        optq.tuning.tune(
            block, {layer: random_weight(4, 4, 4, 2)}, [pair] * 2, torch.eye(4), Storage()
        )


def test_an_error_that_is_not_finite_before_any_step(run, monkeypatch):
    monkeypatch.setattr(optq.tuning, "_mean", lambda error, pairs: float("nan"))
    for each in run(at=None).record.tuned:
        assert each.steps == 0 and each.before is None and not each.kept
        assert each.note == "its error was not finite before any step"


@pytest.mark.parametrize("options", [{"head": 8}, {"skip": r"layers\.1\."}, {"qep": True}])
def test_beside_other_settings(run, source, tmp_path, options):
    result = run(**options)
    assert len(result.record.tuned) == (2 if "skip" in options else 3)
    assert any(each.kept for each in result.record.tuned)
    assert result.record.tune["blocks"]["steps"] == FEW.steps
    assert result.model(SAME).logits.isfinite().all()


def test_widths_within_a_budget(source):
    mixed = Mixed(bits_per_weight=4.0, groupsize=32)
    tune = Tune(FEW)
    result = Runner(ModelConfig(str(source), "cpu"), mixed, calib=SAME, tune=tune).run()
    assert any(each.kept for each in result.record.tuned)
    assert len({choice.wbits for choice in result.choices}) > 1


# What is refused


def test_refused(source, run, tmp_path, monkeypatch):
    monkeypatch.setattr(Flow, "run", lambda _: pytest.fail("it works"))
    for calib in (SAME[:1], None):
        with pytest.raises(DataError, match=r"only one\nchoose --nsamples 2 or more"):
            run(calib=calib, nsamples=1, seqlen=24)
    config = ModelConfig(str(source), "cpu")
    for what in ("blocks", "model"):
        with pytest.raises(SettingError, match=r"rtn is none\nuse --method gptq"):
            Runner(config, RTN(4, 32), tune=what, calib=SAME).run()
    with pytest.raises(SettingError, match=r"--tune is all\nchoose blocks or model"):
        Runner(config, TWO_BITS, tune="all", calib=SAME).run()
    monkeypatch.setattr(optq.tune, "launched", lambda: True)
    with pytest.raises(SettingError, match=r"one process\n.*without torchrun"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_name_stands_for_settings():
    gptq = GPTQ(4)
    assert Tune.of(None, gptq) == Tune(None, None)
    assert Tune.of("blocks", gptq) == Tune()
    both = Tune.of("model", gptq)
    assert both.blocks == Tuning() and both.model is not None
    for name in ("steps", "tokens", "looks", "reach"):
        with pytest.raises(SettingError, match=f"{name} is 0"):
            Tuning(**{name: 0})


@pytest.mark.parametrize(
    ("samples", "seqlen", "size"), [(64, 512, 4), (33, 512, 4), (129, 128, 16), (2, 16, 1)]
)
def test_no_batch_has_samples_held_back_and_others(samples, seqlen, size):
    tokens = torch.arange(samples)[:, None].expand(samples, seqlen)
    batches = Tuning().batches(tokens)
    count = held_back(samples)
    assert torch.equal(torch.cat(batches), tokens) and len(batches[0]) == size
    starts = [batch[0, 0].item() for batch in batches]
    assert samples - count in starts


# A run that is cut off


def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(run, tmp_path):
    run(at="alone", qep=True)

    def cut(step):
        if step.block == 1 and step.tuned:
            raise Cut

    with pytest.raises(Cut):
        run(qep=True, progress=cut)
    blocks, said = [], []
    run(qep=True, progress=lambda step: blocks.append(step.block), notice=said.append)
    assert min(blocks) == 1 and any("going on after 1 of 3" in line for line in said)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_plan_knows_what_tuning_takes(source, monkeypatch):
    monkeypatch.setattr(optq.plan, "resident", lambda: 0)  # which grows between two plans

    def plan(tune):
        return Runner(ModelConfig(str(source), "cpu"), TWO_BITS, tune=tune, calib=SAME).plan()

    without, small, large = (
        plan(tune) for tune in (None, Tune(Tuning(steps=10)), Tune(Tuning(steps=1000)))
    )
    assert without.seconds < small.seconds < large.seconds
    assert without.memory < small.memory == large.memory
    assert small.packed_bytes == without.packed_bytes


def test_other_parameters_ask_for_gradients_as_before(source):
    model, _ = ModelConfig(str(source), "cpu").load()
    before = copy.deepcopy({name: p.requires_grad for name, p in model.named_parameters()})
    result = Runner(
        ModelConfig(str(source), "cpu"), TWO_BITS, tune=Tune(Tuning(steps=1)), calib=SAME
    ).run()
    after = {name: p.requires_grad for name, p in result.model.named_parameters()}
    assert after == before and find_blocks(result.model)
    assert all(p.grad is None for p in result.model.parameters())
