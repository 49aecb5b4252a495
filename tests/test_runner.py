"""Whole runs on tiny models: what is written is what was measured, and bad input is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import datasets
import decoder
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import optq.quantize
import optq.runner
import optq.solving
from optq import GPTQ, OBQ, QEP, RTN, ModelConfig, Runner
from optq.data.evaluation import evaluation_tokens
from optq.errors import DataError, ModelError, NumericsError, OptqError, OutputError, SettingError
from optq.evaluate.perplexity import perplexity
from optq.formats import detect, reader, writer
from optq.model import memory as memory_module
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.linear import QuantizedLinear, make_dense
from optq.model.memory import trim
from optq.model.names import disk_names
from optq.record import TIMES, RunRecord

BY_NAME = {row.name: row for row in (*zoo.ROWS, *zoo.MULTIMODAL, *zoo.REFUSED)}
CALIB = zoo.token_ids(4, 24)
FOUR_BITS = GPTQ.plain(4, 32)
TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=zoo.token_ids() if ids is None else ids, use_cache=False).logits


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Folders of the table's models, written once. To be read only."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = zoo.save(BY_NAME[name], tmp_path_factory.mktemp("zoo") / name)
        return made[name]

    return folder


def quantize(folder, quantizer=FOUR_BITS, **options):
    options = {"calib": CALIB} | options
    return Runner(ModelConfig(str(folder), device="cpu"), quantizer, **options).run()


def measured(config, text):
    model, tokenizer = config.load()
    return perplexity(model, evaluation_tokens(str(text), tokenizer, 16)).perplexity


def contents(folder):
    files = (path for path in sorted(Path(folder).iterdir()) if path.name != TIMES)
    return {path.name: path.read_bytes() for path in files}


def weights(model):
    """All tensors of a model; those of packed layers dequantized, Conv1D's turned round."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{name}.weight"] = module.weight
        elif isinstance(module, Conv1D):
            found[f"{name}.weight"] = module.weight.detach().T
    return found


def check_reload(plain, source, output):
    """The checkpoint is the model in memory: for our reader, and for another decoder."""
    reloaded = reader.load_checkpoint(Checkpoint.open(str(output)))
    expected, found = logits(plain.model).float(), logits(reloaded).float()
    assert torch.linalg.norm(found - expected) < 2e-2 * torch.linalg.norm(expected)
    tensors, back = weights(plain.model), weights(reloaded)
    assert back.keys() == tensors.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, tensors[name]), name
    decoded = decoder.decode(output)
    names = disk_names(plain.model, Checkpoint.open(str(source)).files)
    assert len(decoded) == len(plain.layers)
    for record in plain.layers:
        ours = tensors[f"{record.name}.weight"]
        other = decoded[names[f"{record.name}.weight"].removesuffix(".weight")]
        assert torch.equal(torch.from_numpy(other).float().to(ours.dtype), ours), record.name
    make_dense(reloaded)
    torch.testing.assert_close(logits(reloaded).float(), expected, rtol=1e-5, atol=1e-5)


ROUND_TRIPS = [
    ("gpt2", "gptq", GPTQ.plain(4, 32)),
    ("gpt2_cross_attention", "gptq", GPTQ.plain(4, 32)),
    ("llama_bfloat16", "gptq", GPTQ.plain(3, 32, actorder=True)),
    ("gptj", "gptq_v2", GPTQ.plain(4, 32, sym=False)),
    ("gpt_neo", "gptq", GPTQ.plain(2, 32)),
    ("qwen2", "gptq", GPTQ.plain(8, -1, sym=False, actorder=True)),
    ("gemma3", "gptq", GPTQ.plain(4, 64)),
    ("llava", "gptq_v2", GPTQ.plain(4, 32, actorder=True, static_groups=True)),
    ("qwen2_vl", "gptq", RTN(4, 32)),
    ("falcon", "gptq", GPTQ.plain(4, 32, mse=True)),
    ("llama_tied", "gptq", RTN(3, -1, sym=False)),
    ("mpt", "gptq", GPTQ.plain(4, 32)),
    ("bloom", "gptq", GPTQ.plain(4, 32)),
    ("opt_350m", "gptq", GPTQ.plain(4, 32)),
    ("llama_bfloat16", "gptq", GPTQ(3, 32)),  # scales of either sign, polished
    ("qwen2", "gptq_v2", GPTQ(2, 32, sym=False)),
]


@pytest.mark.parametrize(("name", "form", "quantizer"), ROUND_TRIPS, ids=str)
def test_what_is_written_is_what_was_measured(folder_of, tmp_path, name, form, quantizer):
    source, out = folder_of(name), tmp_path / "out"
    plain = quantize(source, quantizer, format=form)
    result = quantize(source, quantizer, format=form, output=out)
    check_reload(plain, source, out)
    assert not torch.equal(logits(plain.model), logits(BY_NAME[name].build()))

    plain.save(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]
    written = json.loads((out / "optq.json").read_text())
    assert plain.record.model_dump() == result.record.model_dump() == written
    assert RunRecord.read(out / "optq.json").model_dump() == written
    assert plain.dense == result.dense
    blocks = BY_NAME[name].build().get_submodule(BY_NAME[name].blocks)
    assert len(result.dense) == len(BY_NAME[name].never_called) * len(blocks)


@pytest.mark.parametrize("qep", [True, QEP(alpha=1.0, percdamp=0.1)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama_bfloat16"])
def test_error_propagation_round_trip(folder_of, tmp_path, name, qep):
    plain = quantize(folder_of(name), GPTQ.plain(3, 32), qep=qep)
    quantize(folder_of(name), GPTQ.plain(3, 32), qep=qep, output=tmp_path / "out")
    check_reload(plain, folder_of(name), tmp_path / "out")
    without = quantize(folder_of(name), GPTQ.plain(3, 32))
    assert not torch.equal(logits(without.model), logits(plain.model))
    assert plain.record.qep == asdict(QEP() if qep is True else qep)
    assert without.record.qep is None


def test_layers_excluded_from_error_propagation_aim_at_their_own_weights(folder_of):
    plain = weights(quantize(folder_of("llama"), GPTQ.plain(3, 32)).model)
    none = weights(quantize(folder_of("llama"), GPTQ.plain(3, 32), qep=QEP(exclude=".")).model)
    assert all(torch.equal(none[name], plain[name]) for name in plain)
    some = QEP(alpha=1.0, exclude=r"layers\.1\.|layers\.0\.(?!mlp\.up_proj)")
    one = weights(quantize(folder_of("llama"), GPTQ.plain(3, 32), qep=some).model)
    first = {name for name in plain if "layers.0." in name}
    changed = {name for name in first if not torch.equal(one[name], plain[name])}
    assert changed == {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"}


@pytest.mark.parametrize("qep", [False, True])
@pytest.mark.parametrize("quantizer", [FOUR_BITS, GPTQ(3, 32)], ids=["plain", "default"])
def test_the_same_seed_gives_the_same_bytes(folder_of, tmp_path, quantizer, qep):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {"calib": text, "nsamples": 4, "seqlen": 16, "qep": qep}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        quantize(folder_of("llama"), quantizer, output=tmp_path / name, seed=seed, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")
    record = json.loads((tmp_path / "one" / "optq.json").read_text())
    assert record["calibration"] == {
        "text": "text.txt",
        "samples": 4,
        "seqlen": 16,
        "seed": 0,
        "chat": False,
    }
    for path in {*(tmp_path / "one").glob("*.json")} - {tmp_path / "one" / TIMES}:
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("made", [list, json.dumps], ids=["objects", "lines"])
def test_a_list_of_texts_is_calibrated_on_as_a_file_of_them(folder_of, tmp_path, made):
    """Three blocks of the table's model, the same layers, errors and bytes."""
    texts = [TEXT[start:] for start in range(0, 500, 100)]
    (tmp_path / "text.json").write_text(json.dumps(texts))
    options = {"nsamples": 4, "seqlen": 16}
    calib = tmp_path / "text.json" if made is json.dumps else texts
    result = quantize(folder_of("llama"), calib=calib, **options)
    expected = "text.json" if made is json.dumps else "list of 5 texts"
    assert result.record.calibration["text"] == expected
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    file = quantize(folder_of("llama"), calib=tmp_path / "text.jsonl", **options)
    one, other = ([layer.model_dump() for layer in each.layers] for each in (result, file))
    assert one == other


def test_reading_c4_says_how_far_it_is(folder_of, monkeypatch):
    documents = datasets.Dataset.from_dict({"text": [TEXT, "short"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: documents)
    steps = []
    options = {"calib": "c4", "nsamples": 3, "seqlen": 16}
    quantize(folder_of("llama"), reading=lambda *step: steps.append(step), **options)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    steps = []
    evaluation_tokens("c4", zoo.tokenizer(), 16, lambda *step: steps.append(step))
    assert steps == [(n, 256) for n in range(1, 257)]


def test_a_list_of_ids(folder_of):
    result = quantize(folder_of("llama"), calib=[{"input_ids": row[None]} for row in CALIB])
    expected = quantize(folder_of("llama"))
    assert result.record.text() == expected.record.text()
    assert result.record.calibration == {"text": "token ids", "samples": 4, "seqlen": 24}


def test_a_list_is_refused_before_work_starts(folder_of, monkeypatch):
    monkeypatch.setattr("optq.runner.open_model", lambda *_: pytest.fail("the run has begun"))
    with pytest.raises(DataError, match="padded"):
        quantize(folder_of("llama"), calib=[{"input_ids": [5, 0], "attention_mask": [1, 0]}])
    with pytest.raises(DataError, match="list of calibration texts is empty"):
        quantize(folder_of("llama"), calib=[])


@pytest.fixture
def overflowing(tmp_path):
    """A float16 model whose activations go beyond float16; bfloat16 holds them."""
    model = BY_NAME["llama"].build().half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 6e4
        model.model.layers[1].mlp.down_proj.weight *= 1e-4
    model.save_pretrained(tmp_path / "source")
    zoo.tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_float16_that_overflows_is_run_in_another_dtype(overflowing, tmp_path, dtype):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(NumericsError, match="--dtype bfloat16 or float32"):
        quantize(overflowing, output=tmp_path / "out")
    with pytest.raises(NumericsError, match=r"not finite.*\n.*--dtype bfloat16 or float32"):
        measured(ModelConfig(str(overflowing), "cpu"), text)
    config = ModelConfig(str(overflowing), "cpu", dtype)
    expected = measured(config, text)

    plain = Runner(config, GPTQ(8, 32), calib=CALIB).run()
    result = Runner(config, GPTQ(8, 32), calib=CALIB, output=tmp_path / "out").run()
    assert plain.model.dtype == result.model.dtype == getattr(torch, dtype)
    check_reload(plain, overflowing, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    written = measured(ModelConfig(str(tmp_path / "out"), "cpu"), text)
    assert written == pytest.approx(expected, rel=0.05)
    source, out = load_file(overflowing / "model.safetensors"), tmp_path / "out"
    for name, tensor in load_file(out / "model.safetensors").items():
        if name in source:  # dense: whoever loads it casts it
            assert torch.equal(tensor, source[name]) and tensor.dtype == torch.float16


def test_a_dtype_that_is_not_offered(folder_of):
    config = ModelConfig(str(folder_of("llama")), "cpu", "float8")
    with pytest.raises(SettingError, match="dtype is float8\nchoose bfloat16 or float32"):
        Runner(config, FOUR_BITS, calib=CALIB).run()


def test_batches_do_not_matter(folder_of, monkeypatch):
    """How samples are batched changes sums in the last bits at most."""
    one = quantize(folder_of("llama"))
    monkeypatch.setattr(optq.quantize, "BATCH_TOKENS", 24)
    many = quantize(folder_of("llama"))
    assert [record.name for record in one.layers] == [record.name for record in many.layers]
    for record, other in zip(one.layers[:3], many.layers[:3], strict=True):  # of the first site
        assert record.error == pytest.approx(other.error, rel=1e-3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny model that groups of 128 divide, called M in the documentation's programs."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    (folder / "calib.txt").write_text(TEXT)
    return str(folder)


def test_the_programs_of_the_documentation(wide):
    M = wide
    more = {"calib": f"{M}/calib.txt", "nsamples": 4}
    results = [
        Runner(ModelConfig(model_id=M, device="cpu"), GPTQ.plain(wbits=4), **more).run(),
        Runner(ModelConfig(model_id=M), GPTQ.plain(wbits=3, actorder=True), **more).run(),
        Runner(ModelConfig(model_id=M), GPTQ.plain(wbits=4, sym=False), **more).run(),
        Runner(
            model_config=ModelConfig(model_id=M, device="cpu"),
            quantizer=GPTQ.plain(wbits=3, groupsize=128),
            qep=True,
            **more,
        ).run(),
    ]
    for result in results:
        assert len(result.layers) == 14 and logits(result.model.cpu()).isfinite().all()
        assert result.record.calibration["seqlen"] == 64
        assert result.output is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(wide):
    with pytest.raises(SettingError, match="cuda:0 is not here"):
        Runner(ModelConfig(model_id=wide, device="cuda:0"), GPTQ.plain(wbits=4), calib=CALIB).run()
    assert Runner(ModelConfig(model_id=wide), GPTQ.plain(wbits=4), calib=CALIB).run().layers


@pytest.mark.parametrize("device", ["cudaa", "", "meta"])
def test_a_device_that_is_none(wide, device):
    with pytest.raises(SettingError):
        Runner(ModelConfig(model_id=wide, device=device), GPTQ.plain(wbits=4), calib=CALIB).run()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu(wide, tmp_path):
    config = ModelConfig(model_id=wide, device="cuda:0")
    result = Runner(config, GPTQ.plain(4, 128), calib=CALIB, output=tmp_path / "out").run()
    assert len(decoder.decode(tmp_path / "out")) == len(result.layers) == 14


PROMISED = [
    GPTQ.plain(2, 32),
    GPTQ.plain(3, -1, sym=False),
    GPTQ.plain(4, 32, actorder=True),
    GPTQ.plain(3, 32, actorder=True, static_groups=True),
    GPTQ.plain(3, 32, mse=True),
    OBQ(3, 32),
    RTN(3, 32),
]


@pytest.mark.parametrize("quantizer", PROMISED, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_layer_is_worse_than_rounding(folder_of, name, quantizer):
    result = quantize(folder_of(name), quantizer)
    for record in result.layers:
        assert 0 <= record.error <= record.rtn_error * (1 + 1e-6), record.name
    total = sum(record.error for record in result.layers)
    rounding = sum(record.rtn_error for record in result.layers)
    if isinstance(quantizer, RTN):
        assert total == pytest.approx(rounding)
    else:
        assert total < 0.95 * rounding


def test_records_are_complete_and_true(folder_of):
    quantizer = GPTQ.plain(4, 32)
    seen = []
    result = quantize(folder_of("llama"), quantizer, progress=seen.append)
    row = BY_NAME["llama"]
    original = row.build()
    blocks = len(original.get_submodule(row.blocks))
    expected = [
        f"{row.blocks}.{index}.{name}"
        for index in range(blocks)
        for site in row.sites_of(index)
        for name in site
    ]
    assert [record.name for record in result.layers] == expected
    assert [record for progress in seen for record in progress.layers] == result.layers
    assert [progress.site for progress in seen] == [
        f"{row.blocks}.{i}.{site[0]}" for i in range(blocks) for site in row.sites_of(i)
    ]
    assert {progress.blocks for progress in seen} == {blocks}

    reads = {}
    for name in expected:
        result.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: reads.update({name: args[0].double().flatten(0, 1)})
        )
    logits(result.model, CALIB)
    for record in result.layers:
        old = original.get_submodule(record.name).weight.detach().double()
        new = result.model.get_submodule(record.name).weight.detach().double()
        X = reads[record.name]
        H = X.T @ X / len(X)
        error = ((old - new) @ H * (old - new)).sum().item()
        assert record.error == pytest.approx(error, rel=1e-3)
        energy = (old @ H * old).sum().item()
        assert record.relative_error == pytest.approx(error / energy, rel=1e-3)
        assert (record.rows, record.cols) == tuple(old.shape)
        assert record.calls == 1 and record.seconds > 0 and record.damp > 0
        assert record.damp == pytest.approx(0.01 * H.diagonal().mean().item(), rel=1e-4)

    weights = sum(record.rows * record.cols for record in result.layers)
    assert result.bits_per_weight == pytest.approx(8 * result.bytes / weights)
    assert 4.5 < result.bits_per_weight < 6.5  # scales, zero points and g_idx of tiny layers
    assert {"total", "forward", "hessian", "factor", "solve", "write"} <= set(result.seconds)
    parts = sum(result.seconds.values()) - result.seconds["total"]
    assert 0 < parts < result.seconds["total"]
    assert "seconds" not in result.record.text()
    assert [layer.name for layer in result.record.layers] == expected
    assert result.record.method == "gptq" and result.record.quantizer["wbits"] == 4


def test_calls_of_a_module_that_a_later_block_shares_are_in_its_record(folder_of, monkeypatch):
    """They are made after it was solved."""

    def find(model, *what):
        first, second = model.model.layers[:2]
        second.mlp.down_proj = first.mlp.down_proj
        return find_blocks(model, *what)

    monkeypatch.setattr(optq.runner, "find_blocks", find)
    result = quantize(folder_of("llama"))
    calls = {record.name: record.calls for record in result.layers}
    assert calls.pop("model.layers.0.mlp.down_proj") == 2
    assert set(calls.values()) == {1} and "model.layers.1.mlp.down_proj" not in calls


def test_errors_under_propagation_are_the_original_weights(folder_of):
    result = quantize(folder_of("llama"), GPTQ.plain(3, 32), qep=True)
    original, record = BY_NAME["llama"].build(), result.layers[-1]
    reads = []
    result.model.get_submodule(record.name).register_forward_pre_hook(
        lambda module, args: reads.append(args[0].double().flatten(0, 1))
    )
    logits(result.model, CALIB)
    H = reads[0].T @ reads[0] / len(reads[0])
    old = original.get_submodule(record.name).weight.detach().double()
    miss = old - result.model.get_submodule(record.name).weight.detach().double()
    assert record.error == pytest.approx((miss @ H * miss).sum().item(), rel=1e-3)
    assert record.relative_error == pytest.approx(
        record.error / (old @ H * old).sum().item(), rel=1e-3
    )


def test_skipped_layers_stay(folder_of, tmp_path):
    result = quantize(folder_of("llama"), skip=r"k_proj|layers\.0\.mlp", output=tmp_path / "out")
    original, state = BY_NAME["llama"].build(), weights(result.model)
    blocks = len(original.model.layers)
    assert len(result.dense) == blocks + 3
    assert len(result.layers) == 7 * blocks - len(result.dense)
    for name in result.dense:
        assert torch.equal(state[f"{name}.weight"], original.get_submodule(name).weight)
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert len(config["dynamic"]) == len(result.dense)
    assert decoder.decode(tmp_path / "out").keys() == {record.name for record in result.layers}
    assert result.record.dense == result.dense


def test_shards_and_the_loaded_model(folder_of, tmp_path, monkeypatch):
    quantize(folder_of("llama"), output=tmp_path / "whole")
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    result = quantize(folder_of("llama"), output=tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole = decoder.decode(tmp_path / "whole")
    for name, weight in decoder.decode(tmp_path / "shards").items():
        assert np.array_equal(whole[name], weight)
    model, tokenizer = ModelConfig(str(tmp_path / "shards"), "cpu").load()
    assert torch.equal(logits(model), logits(result.model)) and tokenizer("the").input_ids


# Bad input. Nothing is left behind by any of it.


def refusal(kind, folder, tmp_path, quantizer=FOUR_BITS, **options):
    out = tmp_path / "deep" / "out"
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(kind) as caught:
        quantize(folder, quantizer, output=out, **options)
    assert list(out.parent.iterdir()) == []
    assert isinstance(caught.value, OptqError)
    assert "\n" not in caught.value.cause and "\n" not in caught.value.remedy
    return caught.value.cause


def test_seqlen_beyond_the_positions(folder_of, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    cause = refusal(
        SettingError, folder_of("gpt2"), tmp_path, calib=tmp_path / "text.txt", seqlen=4096
    )
    assert "seqlen 4096 is more than the model's 64 positions" in cause


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_token_ids_beyond_the_positions(folder_of, tmp_path, name):
    ids = zoo.token_ids(2, 200)
    cause = refusal((SettingError, DataError), folder_of(name), tmp_path, calib=ids)
    assert "200" in cause and "positions" in cause


@pytest.mark.parametrize("bad", [128, 10**6, -1])
def test_token_ids_outside_the_vocabulary(folder_of, tmp_path, bad):
    ids = zoo.token_ids(2, 24)
    ids[1, 3] = bad
    cause = refusal((SettingError, DataError), folder_of("llama"), tmp_path, calib=ids)
    assert str(bad) in cause


@pytest.mark.parametrize(
    "ids", [torch.zeros(2, 0, dtype=torch.long), torch.rand(2, 8), torch.ones(8, dtype=torch.long)]
)
def test_token_ids_that_are_none(folder_of, tmp_path, ids):
    refusal(DataError, folder_of("llama"), tmp_path, calib=ids)


def test_text_that_is_too_short_or_missing(folder_of, tmp_path):
    (tmp_path / "text.txt").write_text("the end")
    refusal(DataError, folder_of("llama"), tmp_path, calib=tmp_path / "text.txt", seqlen=32)
    refusal(DataError, folder_of("llama"), tmp_path, calib=tmp_path / "nowhere.txt", seqlen=32)


def test_a_groupsize_that_does_not_divide(folder_of, tmp_path):
    cause = refusal(SettingError, folder_of("llama"), tmp_path, GPTQ.plain(4, 48))
    assert "groupsize 48 does not divide the 64 columns of model.layers.0" in cause


def narrow(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=5,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


def test_a_shape_that_cannot_be_packed(tmp_path):
    cause = refusal(SettingError, narrow(tmp_path), tmp_path, GPTQ.plain(3))
    assert "cannot be packed at 3 bits: 40 columns" in cause
    result = quantize(narrow(tmp_path), GPTQ.plain(4), output=tmp_path / "out")
    assert len(decoder.decode(tmp_path / "out")) == len(result.layers) == 7


def test_a_model_that_is_quantized_already(folder_of, tmp_path):
    quantize(folder_of("llama"), output=tmp_path / "first")
    assert "quantized already" in refusal(ModelError, tmp_path / "first", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("quantizer", [GPTQ.plain(4, 32), RTN(4, 32)], ids=["gptq", "rtn"])
def test_nan_in_a_weight_names_the_layer(tmp_path, name, value, quantizer):
    source = zoo.save(BY_NAME[name], tmp_path / "source")
    layer = {"llama": "model.layers.1.mlp.up_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[name]
    path = source / "model.safetensors"
    state = load_file(path)
    state[f"{layer}.weight"][3, 5] = value
    save_file(state, path, metadata={"format": "pt"})
    cause = refusal(NumericsError, source, tmp_path, quantizer)
    assert layer in cause and "block 1" in cause


def test_nan_in_a_norm_names_what_reads_it(tmp_path):
    source = zoo.save(BY_NAME["llama"], tmp_path / "source")
    path = source / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.input_layernorm.weight"][0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    cause = refusal(NumericsError, source, tmp_path)
    assert "model.layers.1.self_attn.q_proj (block 1)" in cause and "sample 0" in cause


@pytest.mark.parametrize("row", zoo.REFUSED, ids=lambda row: row.name)
def test_models_that_cannot_be_quantized(tmp_path, row):
    refusal(ModelError, zoo.save(row, tmp_path / "source"), tmp_path)


def test_other_bad_settings(folder_of, tmp_path):
    llama = folder_of("llama")
    refusal(SettingError, llama, tmp_path, format="gguf")
    refusal(SettingError, llama, tmp_path, skip="(")
    refusal(ModelError, llama, tmp_path, skip=".*")
    refusal(ModelError, tmp_path / "nowhere", tmp_path)
    for options in ({"nsamples": 0}, {"seqlen": 0}, {"seqlen": -3}):
        (tmp_path / "text.txt").write_text(TEXT)
        refusal(SettingError, llama, tmp_path, calib=tmp_path / "text.txt", **options)


def test_an_existing_output(folder_of, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        quantize(folder_of("llama"), output=out)
    plain = quantize(folder_of("llama"))
    with pytest.raises(OutputError, match="exists"):
        plain.save(out)
    assert contents(out) == {"config.json": b"{}", "mine": b"mine"}
    result = quantize(folder_of("llama"), output=out, force=True)
    written = contents(out)
    assert "mine" not in written and decoder.decode(out)
    plain.save(out, force=True)
    assert contents(out) == written
    with pytest.raises(SettingError, match="wrote"):
        result.save(tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="holds the model itself"):
        quantize(folder_of("llama"), output=folder_of("llama"), force=True)


def test_an_empty_folder_that_a_killed_run_has_left(folder_of, tmp_path):
    """It took the name, and died before the checkpoint could be moved there."""
    out, notices = tmp_path / "out", []
    (tmp_path / ".out.partial" / "whole").mkdir(parents=True)
    (tmp_path / ".out.partial" / "lock").touch()
    out.mkdir()
    result = quantize(folder_of("llama"), output=out, notice=notices.append)
    assert decoder.decode(out).keys() == {r.name for r in result.layers} and len(notices) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("theirs", ["empty", "full"])
def test_an_output_that_somebody_makes_meanwhile(folder_of, tmp_path, theirs):
    """It stands, and the run that lost says so."""
    out = tmp_path / "out"

    def progress(what):
        if not out.exists():
            out.mkdir()
            if theirs == "full":
                (out / "mine").write_text("mine")

    with pytest.raises(OutputError, match="was made while the run went on"):
        quantize(folder_of("llama"), output=out, progress=progress)
    assert contents(out) == ({"mine": b"mine"} if theirs == "full" else {})
    out.rename(tmp_path / "theirs")  # as it says; the work is not lost
    quantize(folder_of("llama"), output=out, progress=lambda _: pytest.fail("work began"))
    assert len(decoder.decode(out)) == 21
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theirs"]


def test_force_does_not_replace_what_somebody_adds_meanwhile(folder_of, tmp_path):
    out = tmp_path / "out"
    quantize(folder_of("llama"), output=out)
    before = contents(out)
    with pytest.raises(OutputError, match="was changed while the run went on"):
        quantize(
            folder_of("llama"),
            output=out,
            force=True,
            progress=lambda _: (out / "mine").write_text("mine"),
        )
    assert contents(out) == before | {"mine": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]


@pytest.mark.parametrize("force", [False, True])
def test_two_runs_into_one_folder(folder_of, tmp_path, force):
    """The second is refused at once, and the first goes on."""
    refused = []

    def progress(what):
        if not refused:
            with pytest.raises(OutputError, match="another run is writing") as caught:
                quantize(folder_of("llama"), RTN(4, 32), output=tmp_path / "out", force=force)
            refused.append(caught.value)
            quantize(folder_of("llama"), RTN(4, 32), output=tmp_path / "other")

    result = quantize(folder_of("llama"), output=tmp_path / "out", force=force, progress=progress)
    assert refused and decoder.decode(tmp_path / "out").keys() == {r.name for r in result.layers}
    assert RunRecord.read(tmp_path / "out" / "optq.json").method == "gptq"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_blocks_are_handed_on_in_order(folder_of):
    """Each with the layers that were solved in it, under their names on disk."""
    seen = []

    class Watched(optq.runner.Kept):
        def commit(self, layers, found):
            seen.append(([*layers], [record.name for record in found.layers]))
            super().commit(layers, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optq.runner, "Kept", Watched)
        result = quantize(folder_of("llama"), skip=r"layers\.1\.")
    assert len(seen) == 3
    for block, (on_disk, names) in enumerate(seen):
        inside = [r.name for r in result.layers if r.name.startswith(f"model.layers.{block}.")]
        assert on_disk == names == inside and len(inside) == (0 if block == 1 else 7)


def test_a_text_that_does_not_reach_a_layers_inputs(folder_of):
    """One token in all: far fewer than columns. Damping grows, and the record says so."""
    result = quantize(folder_of("llama"), GPTQ.plain(4, 32, percdamp=0.0), calib=CALIB[:1, :1])
    assert any(record.damp_tries > 0 for record in result.layers)
    assert logits(result.model).isfinite().all()
    assert all(record.error <= record.rtn_error * (1 + 1e-6) for record in result.layers)


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_a_finished_block_leaves_the_memory(tmp_path, monkeypatch):
    """A model larger than memory: neither its weights nor the quantized ones pile up."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=4,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    block = (4 * 512 * 512 + 3 * 512 * 1536) * 4  # bytes, float32
    monkeypatch.setattr(writer, "SHARD_BYTES", 2**20)
    memory = []
    model = ModelConfig(str(tmp_path / "model"), "cpu")
    monkeypatch.setattr(memory_module, "SHORT", 2**60)  # as where memory is short
    Runner(
        model,
        RTN(4, 128),
        calib=torch.randint(64, (2, 32)),
        output=tmp_path / "out",
        progress=lambda _: memory.append(anonymous_memory()),
    ).run()
    each = len(memory) // 12  # steps in a block; the allocator's own heap has grown after four
    assert min(memory[-each:]) - max(memory[: 4 * each]) < 2 * block

    before, memory, read_layer = anonymous_memory(), [], reader.read_layer

    def watched(*arguments):
        trim()  # of what the allocator of a process with many tests behind it keeps
        memory.append(anonymous_memory())
        return read_layer(*arguments)

    monkeypatch.setattr(reader, "read_layer", watched)
    loaded = reader.load_checkpoint(Checkpoint.open(str(tmp_path / "out")))
    packed = sum(buffer.nbytes for buffer in loaded.buffers())
    assert packed < 12 * block / 6 and len(memory) == 12 * 7
    # On the way as well as at the end: the packed weights and one layer unpacked; ``before`` holds
    # nothing spare, since a run gives back what it has freed.
    trim()
    assert max(*memory, anonymous_memory()) - before < packed + 3 * block


@pytest.mark.parametrize("options", [{}, {"actorder": True}, {"sym": False, "groupsize": 32}])
def test_error_propagation_keeps_the_promise_on_the_original_weights(folder_of, options):
    """It aims at other weights, yet no layer ends worse than rounding the ones it was given."""
    settings = {"groupsize": 16, "sym": True} | options
    for quantizer in (GPTQ.plain(2, **settings), GPTQ(2, **settings)):
        result = quantize(folder_of("llama"), quantizer, qep=True)
        assert all(layer.error <= layer.rtn_error * (1 + 1e-6) for layer in result.layers)
        assert sum(layer.error for layer in result.layers) > 0


def test_polish_lowers_the_error_and_has_a_clock_of_its_own(folder_of):
    swept, polished = (
        quantize(folder_of("llama_bfloat16"), GPTQ(3, 32, polish=rounds)) for rounds in (0, 2)
    )
    first = zip(swept.layers[:3], polished.layers[:3], strict=True)  # later inputs differ
    assert all(after.error < 0.95 * before.error for before, after in first)
    assert "polish" not in swept.seconds and polished.seconds["polish"] > 0


@pytest.fixture
def silent(tmp_path):
    """An OPT whose ReLU shuts 40 of the 128 inputs of one layer and all of another, and no more."""
    model = BY_NAME["opt"].build()
    with torch.no_grad():
        for block, count in enumerate((40, 128, 0)):
            bias = model.model.decoder.layers[block].fc1.bias
            bias.copy_(torch.where(torch.arange(128) < count, -50.0, 4.0))
    model.save_pretrained(tmp_path / "silent")
    zoo.tokenizer().save_pretrained(tmp_path / "silent")
    return tmp_path / "silent"


@pytest.mark.parametrize("quantizer", [RTN(8, 32), GPTQ.plain(8, 32), GPTQ(8, 32), OBQ(8, 32)])
@pytest.mark.parametrize("qep", [False, True])
def test_inputs_that_no_token_reached_keep_rounded_weights(silent, tmp_path, quantizer, qep):
    """Another text may reach them. They are counted, and a layer with many is told of."""
    said = []
    result = quantize(silent, quantizer, qep=qep, output=tmp_path / "out", notice=said.append)
    names = [f"model.decoder.layers.{block}.fc2" for block in (0, 1)]
    counts = {layer.name: layer.dead_columns for layer in result.layers if layer.dead_columns}
    assert counts == dict(zip(names, (40, 128), strict=True))
    (line,) = said
    assert line.startswith(
        f"2 layers have inputs that no calibration token reached, {names[1]} 128"
    )
    source, found = load_file(silent / "model.safetensors"), decoder.decode(tmp_path / "out")
    for name, columns in zip(names, (40, 128), strict=True):
        W, Q = (np.asarray(each)[:, :columns] for each in (source[f"{name}.weight"], found[name]))
        groups = np.abs(source[f"{name}.weight"].numpy()).reshape(64, -1, 32).max(2)
        step = np.repeat(groups, 32, axis=1)[:, :columns] / 127  # of min-max grids
        near = np.abs(W - Q) / step  # what shares a group with others may be clipped with them
        assert (near < 0.8).mean() > 0.95 and near.max() < 16


def test_a_few_of_them_are_counted_and_no_more(silent, tmp_path):
    state = load_file(silent / "model.safetensors")
    for block, count in ((0, 12), (1, 0)):
        name = f"model.decoder.layers.{block}.fc1.bias"
        state[name] = torch.where(torch.arange(128) < count, -50.0, 4.0)
    save_file(state, silent / "model.safetensors", metadata={"format": "pt"})
    said = []
    result = quantize(silent, notice=said.append)
    assert sum(layer.dead_columns for layer in result.layers) == 12 and said == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_config", "folder"),
        ("quantizer", "gptq"),
        ("quantizer", GPTQ),
        ("qep", "yes"),
        ("qep", 1),
        ("qep", QEP),
        ("calib", 5),
        ("output", 5),
        ("nsamples", "4"),
        ("nsamples", 4.0),
        ("nsamples", True),
        ("seqlen", 16.0),
        ("seed", None),
        ("seed", "0"),
        ("format", ["gptq"]),
        ("skip", 5),
        ("chat", "yes"),
        ("force", 1),
        ("restart", 1),
        ("progress", None),
        ("reading", 5),
    ],
)
def test_options_of_another_type_are_refused_before_any_work(monkeypatch, name, value):
    monkeypatch.setattr(Checkpoint, "open", lambda *_: pytest.fail("work began"))
    options = {"model_config": ModelConfig("folder", "cpu"), "quantizer": FOUR_BITS, name: value}
    with pytest.raises(SettingError) as refused:
        Runner(**options).run()
    assert refused.value.cause.startswith(f"{name} is ") and len(str(refused.value)) < 150
    assert refused.value.remedy.startswith("pass ")


def test_the_remedy_for_a_type_names_the_types(folder_of):
    with pytest.raises(SettingError, match=r"^seqlen is 16.0\npass what is int \| None$"):
        quantize(folder_of("llama"), seqlen=16.0)
    with pytest.raises(SettingError, match=r"^quantizer is 'gptq'\npass GPTQ\(wbits=4\), say$"):
        quantize(folder_of("llama"), "gptq")


def test_a_name_and_a_device_that_cannot_be(folder_of, monkeypatch):
    monkeypatch.setattr(optq.runner, "open_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(OutputError, match=r"no folder can be called 'a\\x00b'\nchoose another"):
        quantize(folder_of("llama"), output="a\0b")
    with pytest.raises(SettingError, match="the device None is not here\nchoose cpu, or auto"):
        ModelConfig("folder", None).torch_device()


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_float64_model_is_written(folder_of, tmp_path, form):
    """Scales in float32, the widest that readers take, hold those of the file exactly."""
    model = LlamaForCausalLM.from_pretrained(folder_of("llama"), dtype=torch.float64)
    model.save_pretrained(tmp_path / "plain")
    result = quantize(tmp_path / "plain", output=tmp_path / "out", format=form)
    tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    detected = detect(Checkpoint.open(str(tmp_path / "out")))
    ours = weights(quantize(tmp_path / "plain", format=form).model)
    assert result.layers
    for name in (record.name for record in result.layers):
        parts = detected.form.parts
        found = {part: tensors[f"{name}.{part}"] for part in parts if f"{name}.{part}" in tensors}
        decoded = detected.form.decode(name, found, detected.layer(name)).weight
        assert torch.equal(decoded.double(), ours[f"{name}.weight"]), name


def test_an_empty_text_is_no_default(folder_of):
    with pytest.raises(DataError, match="there is no text called ''"):
        quantize(folder_of("llama"), calib="")


def test_an_empty_quantization_config_says_nothing(folder_of, tmp_path):
    shutil.copytree(folder_of("llama"), tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {}}))
    found = quantize(tmp_path / "plain", output=tmp_path / "out")
    assert found.layers and detect(Checkpoint.open(str(tmp_path / "out"))).form.name == "gptq"


@pytest.mark.parametrize(
    "quantizer",
    [GPTQ(3, 32), GPTQ.plain(4, 32, actorder=True), RTN(4, 32, sym=False)],
    ids=["gptq", "plain", "rtn"],
)
def test_rows_that_are_solved_by_portions_are_the_same(folder_of, monkeypatch, quantizer):
    whole, seen = quantize(folder_of("llama"), quantizer, qep=True), []
    own = optq.solving.Solving._portion

    def watched(work, *what):
        seen.append(what[-1])
        return own(work, *what)

    monkeypatch.setattr(optq.solving.Solving, "_portion", watched)
    monkeypatch.setattr("optq.solving.LEAST", 64)
    monkeypatch.setattr("optq.solving.PORTION", 1)
    parts = quantize(folder_of("llama"), quantizer, qep=True)
    assert any(rows.start > 0 for rows in seen)
    assert parts.record.text() == whole.record.text()
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
