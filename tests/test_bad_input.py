"""Bad input through the command: two lines, exit status 2, and nothing left behind."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import optq.formats.writer
from optq import cli

COMMAND = Path(sys.executable).with_name("optq")
BY_NAME = {row.name: row for row in (*zoo.ROWS, *zoo.REFUSED)}
TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40
SETTINGS = ["--nsamples", "4", "--seqlen", "32", "--groupsize", "32", "--device", "cpu"]


@pytest.fixture
def optq_says(capfd, monkeypatch):
    """Run the command in this process, which must refuse; gives the two lines."""
    on_term = signal.getsignal(signal.SIGTERM)

    def run(*words) -> tuple[str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["optq", *map(str, words)])
        for handler in logging.getLogger("transformers").handlers:
            if type(handler) is logging.StreamHandler:
                monkeypatch.setattr(handler, "stream", sys.stderr)  # not an earlier test's
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        return checked(end.value.code, out, err)

    yield run
    signal.signal(signal.SIGTERM, on_term)


def checked(code, out, err) -> tuple[str, str]:
    """Cause and remedy of a refusal that keeps its form; what is done and kept may come first."""
    assert code == 2, err
    assert out == ""
    before = "blocks are kept in", ": relative error"  # a block is done
    lines = [line for line in err.splitlines() if not any(each in line for each in before)]
    assert len(lines) == 2, err
    assert lines[0].startswith("optq: ") and lines[1].startswith("      ")
    cause, remedy = lines[0].removeprefix("optq: "), lines[1].strip()
    assert cause and remedy and "Traceback" not in err and "\x1b" not in err
    # A sentence of some library, cut off where its second line began, helps nobody.
    assert not cause.rstrip().endswith(":") and "above" not in cause
    return cause, remedy


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Folders of the table's models, written once. To be read only."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = zoo.save(BY_NAME[name], tmp_path_factory.mktemp("zoo") / name)
        return made[name]

    return folder


@pytest.fixture
def model(folder_of, tmp_path):
    """A copy of a tiny model, to be broken."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "model"))


@pytest.fixture
def refused(optq_says, tmp_path):
    """`optq quantize MODEL` with good settings and then `words`; cause and remedy."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def run(source, *words) -> tuple[str, str]:
        place = tmp_path / "place"
        place.mkdir(exist_ok=True)
        (place / "mine").write_text("mine")
        said = optq_says("quantize", source, place / "out", "--calib", text, *SETTINGS, *words)
        assert [path.name for path in place.iterdir()] == ["mine"]
        return said

    return run


def change_tensor(folder, name, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state[name])
    save_file(state, path, metadata={"format": "pt"})


def test_eval_of_a_model_beyond_all_bounds(optq_says, model, tmp_path):
    """A perplexity larger than any float is refused: JSON knows no infinity."""
    change_tensor(model, "lm_head.weight", lambda weight: weight.mul_(1e5))
    (tmp_path / "text.txt").write_text(TEXT)
    cause, _ = optq_says("eval", model, "--text", tmp_path / "text.txt", "--json")
    assert "beyond floating point" in cause


# Options

OPTIONS = [
    (["--wbits", "5"], "wbits is 5", "2, 3, 4 or 8"),
    (["--activation-memory", "much"], "--activation-memory much is no size", "8GB"),
    (["--groupsize", "0"], "groupsize is 0", "-1"),
    (["--groupsize", "-2"], "groupsize is -2", "-1"),
    (["--groupsize", "100"], "groupsize 100 does not divide the 64 columns of model.", "-1"),
    (["--percdamp", "7"], "percdamp is 7", "0 to 1"),
    (["--percdamp", "nan"], "percdamp is nan", "0 to 1"),
    (["--nsamples", "0"], "nsamples is 0", "1 or more"),
    (["--seqlen", "0"], "seqlen is 0", "1 or more"),
    (["--seqlen", "65"], "seqlen 65 is more than the model's 64 positions", "64 or less"),
    (["--method", "awq"], "method awq is unknown", "rtn, gptq, obq"),
    (["--format", "gguf"], "format gguf is unknown", "gptq or gptq_v2"),
    (["--method", "rtn", "--actorder"], "rtn has no --actorder", "--method gptq"),
    (["--method", "obq", "--actorder"], "obq has no --actorder", "--method gptq"),
    (["--method", "obq", "--static-groups"], "obq has no --static-groups", "--method gptq"),
    (["--method", "rtn", "--no-actorder"], "rtn has no --no-actorder", "--method gptq"),
    (["--method", "rtn", "--percdamp", "0.1"], "rtn has no --percdamp", "--method gptq"),
    (["--method", "rtn", "--plain"], "rtn has no --plain", "--method gptq"),
    (["--method", "obq", "--polish", "0"], "obq has no --polish", "--method gptq"),
    (["--device", "tpu"], "device tpu is not here", "cpu"),
    (["--device", "meta"], "device meta is not supported", "cpu"),
    (["--device", "cuda:99"], "device cuda:99 is not here", "cpu"),
    (["--skip", "("], "--skip ( is not a regular expression", "escape"),
    (["--skip", "."], "--skip . leaves no layer to quantize", "narrower"),
    (["--chat"], "no chat template", "leave out --chat"),
]


@pytest.mark.parametrize(("words", "cause", "remedy"), OPTIONS, ids=lambda x: str(x)[:40])
def test_a_bad_option(refused, folder_of, words, cause, remedy):
    said = refused(folder_of("llama"), *words)
    assert cause in said[0] and remedy in said[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(refused, folder_of):
    assert "device cuda is not here" in refused(folder_of("llama"), "--device", "cuda")[0]


USAGE = [
    (["quantize", "--nonsense"], "--nonsense"),
    (["quantize", "model"], "out"),
    (["quantize", "model", "out", "--nsamples", "many"], "--nsamples"),
    (["quantise"], "quantise"),
]


@pytest.mark.parametrize(("words", "named"), USAGE, ids=str)
def test_a_bad_usage(capfd, monkeypatch, words, named):
    """typer's own message: which command, where its help is, what is wrong."""
    monkeypatch.setattr(sys, "argv", ["optq", *words])
    on_term = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        cli.main()
    signal.signal(signal.SIGTERM, on_term)
    out, err = capfd.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("Usage: ") and "--help" in err and "Traceback" not in err
    assert named in err


# Models


def a_missing_folder(model):
    shutil.rmtree(model)
    return "does not exist"


def a_file(model):
    (model / "config.json").rename(model.with_name("moved"))
    shutil.rmtree(model)
    model.with_name("moved").rename(model)
    return "is a file"


def no_config(model):
    (model / "config.json").unlink()
    return "has no config.json"


def no_weights(model):
    (model / "model.safetensors").unlink()
    return "has no weights"


def no_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    return "tokenizer"


def half_a_tokenizer(model):
    path = model / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    return "tokenizer"


def a_config_that_is_not_json(model):
    (model / "config.json").write_text("model_type: llama")
    return "is not JSON"


def a_config_that_is_a_list(model):
    (model / "config.json").write_text("[]")
    return "not a configuration"


def a_config_of_nothing(model):
    (model / "config.json").write_text("{}")
    return "config.json"


def a_config_of_an_unknown_family(model):
    (model / "config.json").write_text('{"model_type": "unheard_of"}')
    return "unheard_of"


def change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def a_config_with_a_word_for_a_number(model):
    change_config(model, hidden_size="wide")
    return "hidden_size"


def a_config_without_heads(model):
    change_config(model, num_attention_heads=0)
    return "config.json"


def a_config_of_another_width(model):
    change_config(model, hidden_size=96)
    return "do not fit"


def a_config_of_more_blocks(model):
    change_config(model, num_hidden_layers=4)
    return "missing model.layers.3"


def half_the_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "truncated or corrupt"


def no_bytes_of_weights(model):
    (model / "model.safetensors").write_bytes(b"")
    return "truncated or corrupt"


def corrupt_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])
    return "truncated or corrupt"


def a_shard_that_is_missing(model):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00001-of-00002.safetensors is missing"


def nan_in_a_weight(model):
    change_tensor(model, "model.layers.1.mlp.up_proj.weight", lambda w: w[3, 5:6].fill_(torch.nan))
    return "model.layers.1.mlp.up_proj (block 1) holds NaN"


def infinity_in_a_norm(model):
    change_tensor(model, "model.layers.2.input_layernorm.weight", lambda w: w[:1].fill_(torch.inf))
    return "model.layers.2.self_attn.q_proj (block 2) holds NaN or infinity for calibration sample"


def a_newer_kind_of_tokenizer(model):
    whole = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(whole | {"pre_tokenizer": {"type": "New"}}))
    return "no tokenizer that transformers can read: data did not match"


def a_model_of_its_own_code(model):
    change_config(model, model_type="unheard", auto_map={"AutoConfig": "configuration_x.X"})
    return "custom code"


def a_shape_that_cannot_be_packed(model):
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=72, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(model)
    return "mlp.gate_proj cannot be packed at 3 bits: 72 rows"


def an_adapter(model):
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    return "is an adapter of x/y"


def codes_without_settings(model):
    path, name = model / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    state = load_file(path)
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, path)
    return f"{name} (float8_e4m3fn) is of a quantized model"


BROKEN = [
    a_missing_folder, a_file, no_config, no_weights, no_tokenizer, half_a_tokenizer,
    a_config_that_is_not_json, a_config_that_is_a_list, a_config_of_nothing,
    a_config_of_an_unknown_family, a_config_with_a_word_for_a_number, a_config_without_heads,
    a_config_of_another_width, a_config_of_more_blocks, half_the_weights, no_bytes_of_weights,
    corrupt_weights, a_shard_that_is_missing, nan_in_a_weight, infinity_in_a_norm,
    a_shape_that_cannot_be_packed, an_adapter, codes_without_settings,
    a_newer_kind_of_tokenizer, a_model_of_its_own_code,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_model(refused, model, broken):
    expected = broken(model)
    cause, _ = refused(model, "--wbits", "3")
    assert expected in cause


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert_masked", "BertForMaskedLM is not a causal language model"),
        ("t5", "T5ForConditionalGeneration is not a causal language model"),
        ("dbrx", "holds weights [384, 64] of experts in an unknown layout"),
        ("llama_no_blocks", "has no blocks"),
    ],
)
def test_a_model_of_another_kind(refused, folder_of, name, reason):
    assert reason in refused(folder_of(name))[0]


def test_a_model_that_is_quantized_already(refused, quantized):
    cause, remedy = refused(quantized)
    assert "is quantized already" in cause and "plain" in remedy


def test_a_name_that_the_hub_does_not_give(refused):
    cause, remedy = refused("nobody/nothing")
    assert "there is no folder nobody/nothing" in cause and "folder" in remedy


# Texts

TEXTS = [
    ("short.txt", "the end", "short.txt has 5 tokens, fewer than one sequence of 32"),
    ("empty.txt", "", "empty.txt has no text"),
    ("blank.txt", " \n\n ", "blank.txt has no text"),
    ("latin.txt", "caf\xe9", "is not UTF-8"),
    ("broken.jsonl", '{"text": "the end"}\n{"text": ', "broken.jsonl, line 2 is not JSON"),
    ("fields.jsonl", '{"body": "the end"}\n', "fields.jsonl, line 1 has no field `text`"),
    ("talk.jsonl", '{"messages": []}\n', "talk.jsonl, line 1 has no field `text`"),
]


@pytest.mark.parametrize(("name", "content", "expected"), TEXTS, ids=[each[0] for each in TEXTS])
def test_a_bad_text(refused, folder_of, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    assert expected in refused(folder_of("llama"), "--calib", tmp_path / name)[0]


def test_a_chat_template_that_fails(refused, model, tmp_path):
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] + 1 }}")
    (tmp_path / "talk.jsonl").write_text('{"text": "the end"}')
    cause, _ = refused(model, "--calib", tmp_path / "talk.jsonl", "--chat")
    assert "talk.jsonl: the chat template refuses record 1: " in cause


def test_a_text_in_the_place_of_its_name(optq_says, refused, folder_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where compare keeps its rows
    assert len(refused(folder_of("llama"), "--calib", TEXT)[0]) < 100
    for command in ("compare", "eval"):
        words = ["--text", TEXT, *(["--groupsize", "32"] if command == "compare" else [])]
        assert len(optq_says(command, folder_of("llama"), *words)[0]) < 100


def test_a_damaged_weight_of_a_float32_model_is_not_for_another_dtype(refused, model):
    infinity_in_a_norm(model)
    _, remedy = refused(model)
    assert "copy the model again" in remedy and "dtype" not in remedy


def test_a_dtype_that_is_not_offered(refused, folder_of):
    assert refused(folder_of("llama"), "--dtype", "float16") == (
        "the dtype is float16",
        "choose bfloat16 or float32",
    )


def test_a_prompt_that_is_no_text(optq_says, folder_of):
    """What the shell hands over of bytes that are not UTF-8."""
    assert "refuses the prompt" in optq_says("generate", folder_of("llama"), "caf\udce9")[0]


def test_a_text_that_is_not_there(refused, folder_of, tmp_path):
    assert "there is no file" in refused(folder_of("llama"), "--calib", tmp_path / "none.txt")[0]
    (tmp_path / "folder.txt").mkdir()
    cause, _ = refused(folder_of("llama"), "--calib", tmp_path / "folder.txt")
    assert "cannot be read" in cause


def test_a_name_of_no_text(refused, folder_of):
    cause, remedy = refused(folder_of("llama"), "--calib", "wikitext3")
    assert "'wikitext3'" in cause
    for choice in ("demo", "wikitext2", "ptb", "c4", ".txt", ".jsonl", "NAME:SPLIT:COLUMN"):
        assert choice in remedy


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb", "owner/name:train:text"])
def test_a_set_that_is_out_of_reach(refused, folder_of, monkeypatch, name):
    datasets = pytest.importorskip("datasets")

    def offline(*words, **options):
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    cause, remedy = refused(folder_of("llama"), "--calib", name)
    assert cause == f"{name} cannot be loaded: no network"
    assert "demo, a .txt file or a .jsonl file" in remedy


# Places


def quantize(source, out, tmp_path, *words):
    text = tmp_path / "calib.txt"
    text.write_text(TEXT)
    return ["quantize", source, out, "--calib", text, *SETTINGS, *words]


def everything(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_exists(optq_says, folder_of, tmp_path, kind):
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    (place / "out" / "mine").write_text("mine")
    before, out = everything(place), place / "out"
    out = out if kind == "folder" else out / "mine"
    cause, remedy = optq_says(*quantize(folder_of("llama"), out, tmp_path))
    assert cause == f"{out} exists and holds no checkpoint" and "--force" not in remedy
    optq_says(*quantize(folder_of("llama"), out, tmp_path, "--force"))
    assert everything(place) == before


def move_away(out):
    out.rename(out.with_name("away"))


@pytest.mark.parametrize(
    ("file", "remedy", "follow", "words"),
    [
        ("out/config.json", "pass --force", lambda out: None, ["--force"]),
        ("out", "move it away", move_away, []),
        ("out/thesis.txt", "move it away", move_away, []),
        ("out/thesis.txt", "choose another folder", lambda out: None, []),
    ],
)
def test_the_remedy_for_an_output_that_exists(
    capfd, optq_says, folder_of, tmp_path, file, remedy, follow, words
):
    """Who does what the message says gets a checkpoint, and loses nothing else."""
    place = tmp_path / "place"
    (place / file).parent.mkdir(parents=True)
    (place / file).write_text("{}")
    out = place / "out"
    _, said = optq_says(*quantize(folder_of("llama"), out, tmp_path))
    assert remedy in said
    follow(out)
    out = place / "other" if "another" in remedy else out
    process = start(*quantize(folder_of("llama"), out, tmp_path, *words))
    assert beside_blocks(process.communicate()[1]) == "" and process.returncode == 0
    assert (out / "config.json").is_file()
    assert ".txt" not in file or len([*place.rglob("thesis.txt")]) == 1


def test_a_mount_point_as_output(optq_says, folder_of, tmp_path, monkeypatch):
    """The volume of a container cannot be renamed: said before the work, not after it."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    monkeypatch.setattr("optq.quantize.Quantization.calibrate", too_late)
    cause, remedy = optq_says(*quantize(folder_of("llama"), tmp_path / "out", tmp_path, "--force"))
    assert "mount point" in cause and str(tmp_path / "out" / "model") in remedy


def test_a_read_only_output(optq_says, folder_of, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("optq.quantize.Quantization.calibrate", too_late)
    cause, _ = optq_says(*quantize(folder_of("llama"), tmp_path / "out", tmp_path, "--force"))
    assert cause == f"{tmp_path / 'out'} is read-only"


def test_an_output_in_the_models_place(optq_says, model, tmp_path):
    before = everything(model)
    for out in (model, model.parent):
        cause, _ = optq_says(*quantize(model, out, tmp_path, "--force"))
        assert "holds the model itself" in cause
    assert everything(model) == before


def impossible_below_a_file(place):
    (place / "file").write_text("")
    return place / "file" / "out"


def impossible_in_proc(place):
    return Path("/proc/out")


def impossible_because_of_a_dangling_link(place):
    (place / "out").symlink_to(place / "nowhere")
    return place / "out"


def too_late(*words):
    """Hours lie between the start and the end of a run: what cannot be is said before them."""
    pytest.fail("the run has begun")


@pytest.mark.parametrize(
    "impossible",
    [
        impossible_below_a_file,
        impossible_in_proc,
        impossible_because_of_a_dangling_link,
    ],
    ids=lambda each: each.__name__,
)
def test_an_output_that_cannot_be(optq_says, folder_of, tmp_path, monkeypatch, impossible):
    place = tmp_path / "place"
    place.mkdir()
    out = impossible(place)
    before = everything(place)
    monkeypatch.setattr("optq.quantize.Quantization.calibrate", too_late)
    cause, remedy = optq_says(*quantize(folder_of("llama"), out, tmp_path))
    assert str(out) in cause and "folder" in remedy
    assert ".partial" not in cause  # the user has not named it
    assert everything(place) == before


@pytest.mark.parametrize("length", [248, 300])
def test_an_output_with_a_long_name(optq_says, folder_of, tmp_path, length):
    """The hidden folder's name is longer still."""
    out = tmp_path / "place" / ("x" * length)
    cause, remedy = optq_says(*quantize(folder_of("llama"), out, tmp_path))
    assert cause == f"{out} cannot be written: File name too long"
    assert remedy == "choose a shorter name" and not out.parent.exists()


def test_an_output_in_folders_that_are_not_there_yet(optq_says, model, tmp_path):
    nan_in_a_weight(model)
    before = everything(tmp_path)
    optq_says(*quantize(model, tmp_path / "new" / "newer" / "out", tmp_path))
    after = everything(tmp_path)
    del after[Path("calib.txt")]
    assert after == before


def test_the_current_folder_as_output(optq_says, folder_of, tmp_path, monkeypatch):
    """It cannot be renamed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("optq.quantize.Quantization.calibrate", too_late)
    optq_says(*quantize(folder_of("llama"), ".", tmp_path, "--force"))
    assert list((tmp_path / "here").iterdir()) == []


def test_a_disk_that_fills_up_at_the_end(optq_says, folder_of, tmp_path, monkeypatch):
    """The weights fit; the tokenizer does not."""

    def full(*words):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(optq.formats.writer.shutil, "copy", full)
    cause, remedy = optq_says(*quantize(folder_of("llama"), tmp_path / "place" / "out", tmp_path))
    assert "is full" in cause and "room" in remedy
    assert [path.name for path in (tmp_path / "place").iterdir()] == [".out.partial"]


def beside_blocks(err):
    """What was said beside the lines of blocks that are done."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("block "))


def start(*words, **options):
    return subprocess.Popen(
        [COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def tiny_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full(optq_says, folder_of, tmp_path, tiny_disk, monkeypatch):
    """Known before the work; where it fills up meanwhile, what is done is kept."""
    words = quantize(folder_of("llama"), tiny_disk / "out", tmp_path)
    cause, remedy = optq_says(*words)
    assert "the checkpoint needs" in cause and "is free at" in cause and "room" in remedy
    assert not list(tiny_disk.iterdir())

    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    own, filler = optq.formats.journal.Journal.add, tiny_disk / "filler"

    def add(journal, done):
        own(journal, done)
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1000))

    with monkeypatch.context() as patch:
        patch.setattr(optq.formats.journal.Journal, "add", add)
        cause, remedy = optq_says(*words)
    assert cause == f"the disk of {tiny_disk / 'out'} is full" and "room" in remedy
    assert {path.name for path in tiny_disk.iterdir()} == {".out.partial", "filler"}
    filler.unlink()
    process = start(*words)
    _, err = process.communicate()
    assert process.returncode == 0 and "going on after" in err
    assert [path.name for path in tiny_disk.iterdir()] == ["out"]


# The other commands


@pytest.mark.parametrize("command", ["eval", "generate", "inspect"])
@pytest.mark.parametrize("broken", [a_missing_folder, no_config, half_the_weights])
def test_a_broken_model_in_other_commands(optq_says, model, tmp_path, command, broken):
    (tmp_path / "text.txt").write_text(TEXT)
    broken(model)
    words = {"eval": ["--text", tmp_path / "text.txt"], "generate": ["the"], "inspect": []}
    cause, _ = optq_says(command, model, *words[command])
    assert str(model) in cause


@pytest.mark.parametrize("command", ["eval", "generate", "inspect", "bench", "compare"])
def test_codes_in_other_commands(optq_says, model, command, tmp_path, monkeypatch):
    """Read as numbers they would be thousands of times off, with exit status 0."""
    monkeypatch.chdir(tmp_path)
    expected = codes_without_settings(model)
    text = ["--text", "demo", "--calib", "demo"]
    words = {"eval": text[:2], "generate": ["the"], "compare": text}
    assert expected in optq_says(command, model, *words.get(command, []))[0]


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_model_without_a_tokenizer(optq_says, model, command):
    no_tokenizer(model)
    words = {"eval": ["--text", "demo"], "generate": ["the"]}[command]
    assert "tokenizer" in optq_says(command, model, *words)[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seqlen", "1"], "seqlen is 1"),
        (["--seqlen", "65"], "64 positions"),
        (["--text", "wikitext3"], "wikitext3"),
        (["--device", "tpu"], "tpu"),
        (["--limit", "5"], "eval without --tasks has no --limit"),
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "piqa", "--limit", "0"], "limit is 0"),
    ],
    ids=str,
)
def test_a_bad_option_of_eval(optq_says, folder_of, words, expected):
    assert expected in optq_says("eval", folder_of("llama"), "--text", "demo", *words)[0]


def test_eval_of_a_model_that_is_named_twice(optq_says, folder_of):
    folder = folder_of("llama")
    assert f"{folder} is named twice" in optq_says("eval", folder, folder, "--text", "demo")[0]


def test_eval_against_a_model_of_other_tokens(optq_says, folder_of):
    cause, remedy = optq_says("eval", folder_of("llama"), "--text", "demo", "--against", "demo")
    assert "different tokens" in cause and "--against" in remedy


def test_eval_against_a_model_that_is_not_there(optq_says, folder_of, tmp_path):
    words = ["--text", "demo", "--against", tmp_path / "none"]
    assert str(tmp_path / "none") in optq_says("eval", folder_of("llama"), *words)[0]


def test_eval_beside_damaged_findings(optq_says, quantized, tmp_path):
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    (folder / "optq_eval.json").write_text("{")
    for command in ("eval", "inspect"):
        words = ["--text", "demo"] if command == "eval" else []
        cause, remedy = optq_says(command, folder, *words)
        assert "optq_eval.json is damaged" in cause and "delete it" in remedy


def test_eval_of_tasks_alone_reads_no_text(optq_says, folder_of):
    words = ["--tasks", "piqa", "--seqlen", "32"]
    assert (
        "eval of --tasks alone has no --seqlen" in optq_says("eval", folder_of("llama"), *words)[0]
    )


def test_eval_without_the_harness(optq_says, folder_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    cause, remedy = optq_says("eval", folder_of("llama"), "--tasks", "piqa")
    assert (
        "lm-eval, which cannot be imported" in cause and "pip install lm-eval accelerate" in remedy
    )


def test_eval_of_a_model_of_nan(optq_says, model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    nan_in_a_weight(model)
    cause, _ = optq_says("eval", model, "--text", tmp_path / "text.txt")
    assert "not finite in window 0" in cause


@pytest.mark.parametrize("count", ["0", "-3"])
def test_generate_without_tokens(optq_says, folder_of, count):
    cause, _ = optq_says("generate", folder_of("llama"), "the", "--max-new-tokens", count)
    assert count in cause


def test_generate_without_a_prompt(optq_says, folder_of):
    assert "the prompt is empty" in optq_says("generate", folder_of("llama"), "")[0]


def test_generate_after_a_prompt_beyond_the_positions(optq_says, folder_of):
    assert "64" in optq_says("generate", folder_of("gpt2"), "x" * 100)[0]


@pytest.mark.parametrize("command", [["generate", "the"], ["bench"]], ids=str)
def test_running_on_no_device(optq_says, folder_of, command):
    words = [command[0], folder_of("llama"), *command[1:], "--device", "cuda:99"]
    assert "device cuda:99 is not here" in optq_says(*words)[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "worst"], "method worst is unknown"),
        (["--methods", " ,"], "--methods is empty"),
        (["--wbits", "four"], "--wbits four is no number"),
        (["--groupsize", "48"], "groupsize 48 does not divide"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--wbits", ""], "--wbits is empty"),
        (["--groupsize", ""], "--groupsize is empty"),
        (["--groupsize", "32,-3"], "groupsize is -3"),
        (["--nsamples", "0"], "nsamples is 0"),
        (["--seqlen", "1"], "seqlen is 1"),
        (["--skip", "("], "--skip ( is not a regular expression"),
        (["--skip", "nothing"], "--skip nothing matches no layer"),
        (["--chart", "rises.png"], "is not an .svg"),
        (["--results", "."], ". holds no results"),
        (["--device", "tpu"], "tpu"),
    ],
    ids=str,
)
def test_a_bad_comparison(optq_says, folder_of, tmp_path, words, expected):
    results = tmp_path / "rows.jsonl"
    common = ["--text", "demo", "--calib", "demo", "--groupsize", "32", "--results", results]
    assert expected in optq_says("compare", folder_of("llama"), *common, *words)[0]
    assert not results.exists() or not results.read_text()


def test_bench_of_a_plain_model(optq_says, folder_of):
    assert "no quantized layers" in optq_says("bench", folder_of("llama"))[0]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("awq", {"bits": 4, "group_size": 128}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("quanto", {"weights": "int8"}),
    ],
)
@pytest.mark.parametrize("command", ["generate", "export", "bench", "inspect"])
def test_a_checkpoint_of_another_method(optq_says, model, tmp_path, method, settings, command):
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (model / "config.json").write_text(json.dumps(config))
    words = {"generate": ["the"], "export": [tmp_path / "out", "--format", "gptq"]}
    cause, remedy = optq_says(command, model, *words.get(command, []))
    assert f"quantized with {method}" in cause and "compressed-tensors" in remedy
    assert not (tmp_path / "out").exists()


def test_demo_on_no_device(optq_says):
    assert "tpu" in optq_says("demo", "--device", "tpu")[0]


@pytest.fixture(scope="module")
def quantized(folder_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    words = [*quantize(folder_of("llama"), folder / "out", folder), "--json"]
    subprocess.run([COMMAND, *map(str, words)], check=True, capture_output=True)
    return folder / "out"


def a_config_without(key):
    def broken(folder):
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"][key]
        (folder / "config.json").write_text(json.dumps(config))

    broken.__name__ = f"a_config_without_{key}"
    return broken


def a_config_of_a_word(folder):
    change_config(folder, quantization_config="gptq")


def a_record_that_is_not_json(folder):
    (folder / "optq.json").write_text("{")


def a_record_of_something_else(folder):
    (folder / "optq.json").write_text("{}")


def a_record_that_is_cut(folder):
    text = (folder / "optq.json").read_text()
    (folder / "optq.json").write_text(text[: len(text) // 2])


def a_record_of_a_newer_version(folder):
    record = json.loads((folder / "optq.json").read_text()) | {"version": 3}
    (folder / "optq.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "broken",
    [
        a_config_without("bits"), a_config_of_a_word, a_record_that_is_not_json,
        a_record_of_something_else, a_record_that_is_cut, a_record_of_a_newer_version,
    ],
    ids=lambda broken: broken.__name__,
)  # fmt: skip
def test_inspect_of_a_broken_checkpoint(optq_says, quantized, tmp_path, broken):
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    broken(folder)
    optq_says("inspect", folder)


@pytest.mark.parametrize("key", ["sym", "desc_act", "group_size"])
def test_inspect_of_a_checkpoint_that_says_less(capfd, monkeypatch, quantized, tmp_path, key):
    """Other programs write other keys; what is not said is not shown, or refused in two lines."""
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    a_config_without(key)(folder)
    (folder / "optq.json").unlink()
    monkeypatch.setattr(sys, "argv", ["optq", "inspect", str(folder)])
    on_term = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        cli.main()
    signal.signal(signal.SIGTERM, on_term)
    assert end.value.code in (0, 2)
    capfd.readouterr()


# Interruptions


def begun(place, process):
    """Wait until the run has begun to write; gives the hidden folder."""
    for _ in range(1200):
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        if found := list(place.glob(".out.partial/whole")):
            return found[0].parent
        time.sleep(0.1)
    raise AssertionError("nothing has begun after two minutes")


LONG = ["--nsamples", "2000", "--seqlen", "512", "--device", "cpu"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interruption(tmp_path, number):
    process = start("quantize", "demo", tmp_path / "out", *LONG)
    begun(tmp_path, process)
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line]
    assert process.returncode == 130 and out == ""
    assert len(lines) == 2 and "interrupted" in lines[0] and "as it was" in lines[1]
    assert list(tmp_path.iterdir()) == []


def test_a_kill(folder_of, tmp_path):
    """A process that is killed cannot clean up; it must not seem to have finished."""
    place = tmp_path / "place"
    place.mkdir()
    process = start("quantize", "demo", place / "out", *LONG)
    hidden = begun(place, process)
    process.kill()
    process.communicate()
    assert [path.name for path in place.iterdir()] == [hidden.name]
    again = start(*quantize(folder_of("llama"), place / "out", tmp_path))
    _, err = again.communicate()
    assert again.returncode == 0
    removed = f"optq: removed {hidden}, which a run that was cut off has left\n"
    assert beside_blocks(err) == removed
    assert sorted(path.name for path in place.iterdir()) == ["out"]


# What libraries write to the process' own streams is seen here alone.


@pytest.mark.parametrize(
    "broken", [a_config_of_another_width, a_config_of_more_blocks, no_tokenizer]
)
def test_libraries_keep_quiet(model, tmp_path, broken):
    broken(model)
    process = start(*quantize(model, tmp_path / "out", tmp_path))
    out, err = process.communicate()
    lines = [line for line in err.splitlines() if line]
    assert (process.returncode, out, len(lines)) == (2, "", 2), err
    assert lines[0].startswith("optq: ")
