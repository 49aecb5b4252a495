"""Checkpoints on disk: whole, broken, renamed, tied; and models that must be refused."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from optq.errors import ModelError, SettingError
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.source import (
    disk_names,
    empty_model,
    load_model,
    load_tokenizer,
    positions,
    sequence_length,
)
from optq.model.weights import Weights

BY_NAME = {row.name: row for row in (*zoo.ROWS, *zoo.MULTIMODAL, *zoo.REFUSED)}


def logits(model):
    with torch.no_grad():
        return model(input_ids=zoo.token_ids(), use_cache=False).logits


def saved(name, folder, **options):
    zoo.save(BY_NAME[name], folder)
    if options:
        model = BY_NAME[name].build()
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, **options)
    return folder


def as_bin(folder, shards=1, **options):
    """Turn the folder's weights into what ``torch.save`` writes."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    names, where = sorted(state), {}
    for index in range(shards):
        file = f"pytorch_model-{index + 1:05}-of-{shards:05}.bin"
        members = names[index::shards]
        torch.save({name: state[name] for name in members}, folder / file, **options)
        where |= dict.fromkeys(members, file)
    text = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    return folder


def check_reads(folder, name="llama"):
    """All tensors are there, and the model is that of the table."""
    checkpoint = Checkpoint.open(str(folder))
    model = load_model(checkpoint)
    assert torch.equal(logits(model), logits(BY_NAME[name].build()))
    tensors = dict(checkpoint.tensors())
    assert tensors.keys() == checkpoint.files.keys()
    assert checkpoint.layout.keys() == tensors.keys()
    for name, tensor in checkpoint.layout.items():
        assert tensor.is_meta
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
    two = sorted(tensors)[:2]
    for name, tensor in checkpoint.tensors(two):
        assert torch.equal(tensor, tensors[name])
    return checkpoint, model


def test_one_file(tmp_path):
    checkpoint, model = check_reads(saved("llama", tmp_path))
    assert set(checkpoint.files.values()) == {"model.safetensors"}
    assert not model.training and model.dtype == torch.float32
    assert [path.name for path in checkpoint.companions()] == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load_tokenizer(checkpoint)("the").input_ids


def test_sharded_files(tmp_path):
    checkpoint, _ = check_reads(saved("llama", tmp_path, max_shard_size="100KB"))
    assert len(set(checkpoint.files.values())) > 2
    assert "model.safetensors.index.json" not in [p.name for p in checkpoint.companions()]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_files_of_torch_save(tmp_path, shards, zipped):
    folder = as_bin(saved("llama", tmp_path), shards, _use_new_zipfile_serialization=zipped)
    checkpoint, _ = check_reads(folder)
    assert len(set(checkpoint.files.values())) == shards


def test_the_dtype_is_the_checkpoints(tmp_path):
    _, model = check_reads(saved("llama_bfloat16", tmp_path), "llama_bfloat16")
    assert model.dtype == torch.bfloat16


def test_home_and_relative_paths(tmp_path, monkeypatch):
    saved("llama", tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Checkpoint.open("~/model").files
    monkeypatch.chdir(tmp_path)
    assert Checkpoint.open("model").files


def shard_of(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refusal(folder):
    """How opening or else loading the folder is refused, as the two lines of the command."""
    with pytest.raises(ModelError) as caught:
        load_model(Checkpoint.open(str(folder)))
    assert "\n" not in caught.value.cause and "\n" not in caught.value.remedy
    return caught.value.cause


def test_a_missing_shard_is_named(tmp_path):
    folder = saved("llama", tmp_path, max_shard_size="100KB")
    shard = shard_of(folder)
    shard.unlink()
    assert f"{shard} is missing" in refusal(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_missing_bin_shard_is_named(tmp_path, zipped):
    folder = as_bin(saved("llama", tmp_path), 2, _use_new_zipfile_serialization=zipped)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin is missing" in refusal(folder)


@pytest.mark.parametrize(
    "damage", [halve, lambda p: p.write_bytes(b""), lambda p: p.write_text("x" * 99)]
)
def test_a_damaged_shard_is_named(tmp_path, damage):
    folder = saved("llama", tmp_path, max_shard_size="100KB")
    damage(shard_of(folder))
    assert f"{shard_of(folder)} is truncated or corrupt" in refusal(folder)


@pytest.mark.parametrize(
    "damage", [halve, lambda p: p.write_bytes(b""), lambda p: p.write_text("x" * 99)]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_bin_is_named(tmp_path, damage, zipped):
    folder = as_bin(saved("llama", tmp_path), _use_new_zipfile_serialization=zipped)
    damage(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is truncated or corrupt" in refusal(folder)


def test_a_bin_with_code_in_it_is_not_run(tmp_path):
    folder = as_bin(saved("llama", tmp_path))
    mark = tmp_path / "mark"

    class Attack:
        def __reduce__(self):
            return Path.touch, (mark,)

    torch.save({"x": Attack()}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"x": Attack()}, file)
    assert "pytorch_model.bin" in refusal(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"x": 1}}'],
)
def test_a_corrupt_index_is_named(tmp_path, text):
    folder = saved("llama", tmp_path, max_shard_size="100KB")
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is not an index" in refusal(folder)


def test_no_weights(tmp_path):
    folder = saved("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    assert f"{folder} has no weights" in refusal(folder)


def test_the_only_file_of_safetensors_is_the_one(tmp_path):
    folder = saved("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "llama-7b.safetensors")
    for other in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"other": torch.ones(1)}, folder / other)
    checkpoint, _ = check_reads(folder)
    assert set(checkpoint.files.values()) == {"llama-7b.safetensors"}
    save_file({"other": torch.ones(1)}, folder / "more.safetensors")
    assert "llama-7b.safetensors, more.safetensors, and no index" in refusal(folder)


def test_a_pickle_of_something_else(tmp_path):
    folder = as_bin(saved("llama", tmp_path))
    for content in ([torch.ones(1)], {"state_dict": {"x": torch.ones(1)}}):
        torch.save(content, folder / "pytorch_model.bin")
        assert "does not hold tensors by name" in refusal(folder)


def test_an_adapter_beside_a_model_is_not_its_own(tmp_path):
    """Neither is it copied without its weights, nor put onto the model where peft is there."""
    folder = saved("llama", tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    save_file({"lora": torch.ones(1)}, folder / "adapter_model.safetensors")
    checkpoint, _ = check_reads(folder)
    assert not any("adapter" in path.name for path in checkpoint.companions())


def test_files_that_speak_of_what_is_gone_stay_behind(tmp_path):
    folder = saved("llama", tmp_path)
    travels = {"README.md", "preprocessor_config.json", "tokenizer.model", "tekken.json", "x.py"}
    stays = {
        *("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "model.onnx_data"),
        *("openvino_model.xml", "openvino_model.bin", "x.gguf", "params.json", "consolidated.pth"),
        *("optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", ".cache"),
        *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml"),
    }
    before = {path.name for path in Checkpoint.open(str(folder)).companions()}
    for name in travels | stays:
        (folder / name).write_text("{}")
    checkpoint = Checkpoint.open(str(folder))
    assert {path.name for path in checkpoint.companions()} == before | travels


def test_the_model_has_the_generation_config_of_the_folder(tmp_path):
    folder = saved("llama", tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_model(Checkpoint.open(str(folder))).generation_config.eos_token_id == [2, 7]


def remedy(folder):
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(str(folder))
    assert "\n" not in caught.value.remedy
    return caught.value.remedy


@pytest.mark.parametrize("base", ["x/y", None])
def test_an_adapter_in_place_of_a_model(tmp_path, base):
    config = {"peft_type": "LORA"} | ({"base_model_name_or_path": base} if base else {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert f"is an adapter of {base or 'a model'}" in refusal(tmp_path)
    assert "merge_and_unload" in remedy(tmp_path)


def test_other_things_in_place_of_a_model(tmp_path):
    (tmp_path / "model.gguf").write_text("GGUF")
    assert "model.gguf is a GGUF file" in refusal(tmp_path / "model.gguf")
    assert "has no config.json, and GGUF files" in refusal(tmp_path)
    assert "save_pretrained" in remedy(tmp_path)
    (tmp_path / "consolidated.00.pth").write_text("")
    assert "in the layout of their makers" in refusal(tmp_path)


def test_a_model_in_a_folder_inside(tmp_path):
    saved("llama", tmp_path / "model" / "hf")
    assert "has no config.json, and hf inside it has" in refusal(tmp_path / "model")
    assert remedy(tmp_path / "model") == f"give {tmp_path / 'model' / 'hf'}"


def test_no_config(tmp_path):
    folder = saved("llama", tmp_path)
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '"text"'])
def test_a_config_that_is_not_one(tmp_path, text):
    folder = saved("llama", tmp_path)
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"model_type": "no-such-model", "architectures": ["NoSuchForCausalLM"]},
        {"hidden_size": "wide"},
        {"architectures": ["LlamaModel"]},
    ],
    ids=str,
)
def test_a_config_that_transformers_does_not_know(tmp_path, changes):
    folder = saved("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    refusal(folder)


def reconfigured(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": []},
        {"architectures": ["LLaMAForCausalLM"]},
        {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}},
        {"auto_map": {"AutoConfig": "x.X"}, "architectures": ["XForCausalLM"]},
    ],
    ids=str,
)
def test_the_model_type_says_enough(tmp_path, monkeypatch, changes):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    folder = reconfigured(saved("llama", tmp_path), **changes)
    (folder / "configuration_x.py").write_text("raise SystemExit")
    check_reads(folder)
    assert load_tokenizer(Checkpoint.open(str(folder)))("the").input_ids


def test_a_class_that_is_a_guess_must_take_all_weights(tmp_path):
    folder = reconfigured(saved("llama", tmp_path), architectures=["LlamaWithMoreForCausalLM"])
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.more": torch.ones(2)}, path, {"format": "pt"})
    assert "do not fit LlamaForCausalLM: unexpected model.layers.0.more" in refusal(folder)


@pytest.mark.parametrize("name", ["bert_masked", "t5"])
def test_the_model_type_of_another_kind_does_not(tmp_path, name):
    folder = reconfigured(saved(name, tmp_path), architectures=["MyOwnForCausalLM"])
    assert "MyOwnForCausalLM is not a causal language model" in refusal(folder)


@pytest.mark.parametrize("part", ["AutoConfig", "AutoModelForCausalLM"])
def test_a_models_own_code_is_refused_and_not_asked_about(tmp_path, monkeypatch, part):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    folder = saved("llama", tmp_path)
    reconfigured(folder, model_type="unheard", auto_map={part: "configuration_x.X"})
    with pytest.raises(ModelError) as caught:
        load_model(Checkpoint.open(str(folder)))
    assert "runs no code that a model brings" in caught.value.remedy
    assert "converted to a class that transformers has" in caught.value.remedy


def test_a_byte_order_mark(tmp_path):
    folder = saved("llama", tmp_path)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"not JSON.*\n.*without a byte-order mark"):
        load_model(Checkpoint.open(str(folder)))


def test_whatever_a_models_class_raises(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(str(saved("llama", tmp_path)))
    fault = ZeroDivisionError("no heads")

    def broken(*_, **__):
        raise fault

    with pytest.raises(ZeroDivisionError) as defect:  # of OPTQ, called back by transformers
        load_model(checkpoint, broken)
    assert defect.value is fault
    monkeypatch.setattr("transformers.LlamaModel.__init__", broken)
    for load in (load_model, empty_model):
        with pytest.raises(ModelError, match="cannot be loaded: no heads") as caught:
            load(checkpoint)
        assert caught.value.__cause__ is fault
    monkeypatch.setattr("transformers.LlamaConfig.from_dict", broken)
    with pytest.raises(ModelError, match=r"cannot read .*config.json: no heads"):
        load_model(checkpoint)


def test_whatever_the_hub_raises(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("client closed\nlong story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    assert "no folder nobody/x, and the hub does not give it: client closed" in refusal("nobody/x")


def test_another_dtype_than_the_checkpoints(tmp_path):
    own = saved("llama_bfloat16", tmp_path / "a")
    checkpoint = Checkpoint.open(str(own), torch.float32)
    model, before = load_model(checkpoint), load_model(Checkpoint.open(str(own)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other.float())
    assert checkpoint.config()["dtype"] == "float32"

    nested = reconfigured(saved("llava", tmp_path / "b"), quantization_config={"dtype": "int8"})
    config = json.loads((nested / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # as older programs write it
    (nested / "config.json").write_text(json.dumps(config))
    changed = Checkpoint.open(str(nested), torch.bfloat16).config()
    assert changed["torch_dtype"] == "bfloat16" and "dtype" not in changed
    assert changed["text_config"]["dtype"] == changed["vision_config"]["dtype"] == "bfloat16"
    assert changed["quantization_config"] == {"dtype": "int8"}
    del config["torch_dtype"]
    (nested / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(str(nested), torch.bfloat16).config()["torch_dtype"] == "bfloat16"


def test_no_such_folder(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")


def test_no_such_id_on_a_hub_that_cannot_be_reached():
    assert "nobody/no-such-model" in refusal("nobody/no-such-model")
    assert "not a valid id!" in refusal("not a valid id!")


def test_a_missing_tensor_is_named(tmp_path):
    folder = saved("llama", tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    del state[name]
    save_file(state, path, metadata={"format": "pt"})
    assert name in refusal(folder)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path):
    folder = saved("llama", tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name][:-1].clone()
    save_file(state, path, metadata={"format": "pt"})
    refusal(folder)


def test_no_tokenizer(tmp_path):
    folder = saved("llama", tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(Checkpoint.open(str(folder)))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_tokenizer(tmp_path, text):
    folder = saved("llama", tmp_path)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(Checkpoint.open(str(folder)))


def tokenizer_refusal(folder):
    with pytest.raises(ModelError, match="no tokenizer that transformers can read: ") as caught:
        load_tokenizer(Checkpoint.open(str(folder)))
    assert "\n" not in caught.value.cause + caught.value.remedy
    return caught.value


def test_a_tokenizer_of_a_kind_that_is_not_known_yet(tmp_path):
    folder = saved("llama", tmp_path)
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(whole | {"pre_tokenizer": {"type": "New"}}))
    error = tokenizer_refusal(folder)  # the Rust package raises a bare Exception
    assert "did not match any variant" in error.cause and "update transformers" in error.remedy


@pytest.mark.parametrize(
    ("said", "file", "packages"),
    [
        (ImportError("\nX requires the SentencePiece library but"), None, "sentencepiece"),
        (ImportError("X requires the protobuf library but"), None, "protobuf"),
        (ImportError("blobfile is not installed."), None, "blobfile"),
        (ValueError("`tiktoken` is required"), b"IQ== 0\n", "tiktoken"),
        (ValueError("`tiktoken` is required"), b"\n\x0e\n\x05<unk>", "sentencepiece protobuf"),
    ],
    ids=["sentencepiece", "protobuf", "blobfile", "tiktoken", "blamed"],
)
def test_a_package_that_the_tokenizer_needs(tmp_path, monkeypatch, said, file, packages):
    def fails(*_, **__):
        try:
            raise ModuleNotFoundError("No module")
        except ModuleNotFoundError:
            raise said  # noqa: B904  as transformers does

    folder = saved("llama", tmp_path)
    (folder / "tokenizer.json").unlink()
    if file is not None:
        (folder / "tokenizer.model").write_bytes(file)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    monkeypatch.setattr("optq.model.source.distributions", list)
    assert f"`pip install {packages}`" in tokenizer_refusal(folder).remedy
    here = [type("Here", (), {"name": name}) for name in packages.split()]
    monkeypatch.setattr("optq.model.source.distributions", lambda: here)
    assert "pip install" not in tokenizer_refusal(folder).remedy


def test_a_tokenizer_of_a_models_own_code(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    folder = saved("llama", tmp_path)
    whole = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["x.My", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole | own))
    error = tokenizer_refusal(folder)
    assert "no code that a model brings" in error.remedy and "auto_map" in error.remedy
    del own["auto_map"]  # as the remedy says
    (folder / "tokenizer_config.json").write_text(json.dumps(whole | own))
    ids = load_tokenizer(Checkpoint.open(str(folder)))("the end").input_ids
    assert ids == zoo.tokenizer()("the end").input_ids


@pytest.mark.parametrize("row", zoo.ROWS + zoo.MULTIMODAL, ids=lambda row: row.name)
def test_each_weight_of_the_blocks_has_its_name_on_disk(tmp_path, row):
    folder = zoo.save(row, tmp_path / "model")
    checkpoint = Checkpoint.open(str(folder))
    model = load_model(checkpoint)
    names = disk_names(model, checkpoint.files)
    assert disk_names(empty_model(checkpoint), checkpoint.files) == names
    assert len(set(names.values())) == len(names)
    tensors, state = dict(checkpoint.tensors()), model.state_dict()
    for in_model, on_disk in names.items():
        assert torch.equal(tensors[on_disk], state[in_model]), in_model
    for block in find_blocks(model):
        for layer in block.layers:
            assert f"{layer.name}.weight" in names
    assert torch.equal(logits(model), logits(row.build()))


@pytest.mark.parametrize(
    ("name", "in_model", "on_disk"),
    [
        (
            "llava",
            "model.language_model.layers.1.mlp.up_proj.weight",
            "language_model.model.layers.1.mlp.up_proj.weight",
        ),
        (
            "qwen2_vl",
            "model.language_model.layers.1.mlp.up_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
        ),
        (
            "gpt2",
            "transformer.h.1.mlp.c_fc.weight",
            "transformer.h.1.mlp.c_fc.weight",
        ),
    ],
)
def test_names_that_differ_on_disk(tmp_path, name, in_model, on_disk):
    checkpoint = Checkpoint.open(str(saved(name, tmp_path)))
    assert disk_names(load_model(checkpoint), checkpoint.files)[in_model] == on_disk


def test_a_base_models_names(tmp_path):
    """What GPT-2's own checkpoint does: it was saved without its head, and without a prefix."""
    folder = saved("gpt2", tmp_path)
    path = folder / "model.safetensors"
    state = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    checkpoint, model = check_reads(folder, "gpt2")
    names = disk_names(model, checkpoint.files)
    assert names["transformer.h.0.mlp.c_fc.weight"] == "h.0.mlp.c_fc.weight"


def test_unused_tensors_on_disk_do_not_disturb(tmp_path):
    """Old checkpoints hold buffers that newer models do not have."""
    folder = saved("gpt2", tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    save_file(state, path, metadata={"format": "pt"})
    checkpoint, model = check_reads(folder, "gpt2")
    assert "transformer.h.0.attn.bias" not in disk_names(model, checkpoint.files)


def test_tied_weights_are_one_tensor(tmp_path):
    checkpoint, model = check_reads(saved("llama_tied", tmp_path), "llama_tied")
    assert "lm_head.weight" not in checkpoint.files
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_of_torch_save(tmp_path):
    folder = as_bin(saved("llama_tied", tmp_path))
    path = folder / "pytorch_model.bin"
    state = torch.load(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, path)
    checkpoint, model = check_reads(folder, "llama_tied")
    assert "lm_head.weight" in checkpoint.files
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_whether_the_head_is_tied_is_what_the_file_shows(tmp_path, name, equal):
    """A merged fine-tune may have a head of its own, and say that it is tied."""
    folder = saved(name, tmp_path)
    model = BY_NAME[name].build()
    head = model.get_input_embeddings().weight.detach() + (not equal)
    state = load_file(folder / "model.safetensors") | {"lm_head.weight": head.contiguous()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.config()["tie_word_embeddings"] is True
    loaded = load_model(checkpoint)
    assert loaded.config.tie_word_embeddings is equal
    assert empty_model(checkpoint).config.tie_word_embeddings is equal
    assert torch.equal(loaded.lm_head.weight, head)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is equal


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "max_position_embeddings"),
        ("gpt2", "n_positions"),
        ("mpt", "max_seq_len"),
        ("llava", "max_position_embeddings"),
    ],
)
def test_positions(name, key):
    model = BY_NAME[name].build()
    assert positions(model) == getattr(BY_NAME[name].config().get_text_config(), key) > 0


def test_no_positions():
    bloom = BY_NAME["bloom"].build()
    assert positions(bloom) is None
    assert sequence_length(bloom, None) == 2048 and sequence_length(bloom, 4096) == 4096


def test_the_length_of_a_sequence():
    model = BY_NAME["llama"].build()  # 64 positions
    assert sequence_length(model, None) == 64 and sequence_length(model, 16) == 16
    with pytest.raises(SettingError, match="65 is more than the model's 64 positions"):
        sequence_length(model, 65)


REFUSALS = {
    "bert_masked": ("load", "BertForMaskedLM is not a causal language model"),
    "bert": ("load", "BertModel is not a causal language model"),
    "t5": ("load", "T5ForConditionalGeneration is not a causal language model"),
    "dbrx": ("blocks", r"experts\.mlp\.w1 holds weights .* of experts in an unknown layout"),
    "rwkv": ("flow", "the model changes .* while it runs"),
    "llama_no_blocks": ("blocks", "has no blocks with linear layers"),
}


@pytest.mark.parametrize("row", zoo.REFUSED, ids=lambda row: row.name)
def test_what_cannot_be_quantized_is_refused_where_it_is_seen(tmp_path, row):
    stage, message = REFUSALS[row.name]
    checkpoint = Checkpoint.open(str(zoo.save(row, tmp_path)))
    reached = "load"
    with pytest.raises(ModelError, match=message) as caught:
        model = load_model(checkpoint)
        reached = "blocks"
        blocks = find_blocks(model)
        reached = "flow"
        weights = Weights(model, blocks, torch.device("cpu"))
        Flow(model, blocks, [zoo.token_ids()], weights, list).run()
    assert reached == stage
    assert "\n" not in caught.value.cause and caught.value.remedy


def test_skip_must_be_a_regular_expression_that_leaves_something():
    model = BY_NAME["llama"].build()
    with pytest.raises(SettingError, match="not a regular expression"):
        find_blocks(model, "(")
    with pytest.raises(ModelError, match="leaves no layer"):
        find_blocks(model, ".")
    blocks = find_blocks(model, "q_proj")
    assert not any("q_proj" in layer.name for block in blocks for layer in block.layers)
    assert all(f"{block.name}.self_attn.q_proj" in block.linears for block in blocks)


@pytest.mark.parametrize("row", zoo.ROWS + zoo.MULTIMODAL, ids=lambda row: row.name)
def test_blocks_and_their_layers_are_found_by_shape(row):
    model = row.build()
    blocks = find_blocks(model)
    members = list(model.get_submodule(row.blocks))
    assert [block.module for block in blocks] == members
    assert [block.name for block in blocks] == [f"{row.blocks}.{i}" for i in range(len(members))]
    for block in blocks:
        names = [*(name for site in row.sites_of(block.index) for name in site), *row.never_called]
        found = [layer.name.removeprefix(block.name + ".") for layer in block.layers]
        assert sorted(found) == sorted(names)
        assert block.linears == [layer.name for layer in block.layers]
        for layer in block.layers:
            wide = layer.module(torch.zeros(1, layer.shape[1], dtype=row.dtype))
            assert wide.shape[1] == layer.shape[0]


def anonymous_bytes():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    pytest.skip("the system does not say how much memory is anonymous")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc of Linux")
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc of Linux")
def test_weights_are_mapped_not_read(tmp_path):
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, vocab_size=128
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {
        name: torch.full(tuple(p.shape), 0.01, dtype=torch.bfloat16)
        for name, p in model.named_parameters()
    }
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in state.values())
    assert size > 80 * 2**20
    del state, model

    checkpoint = Checkpoint.open(str(tmp_path))
    before = anonymous_bytes()
    model = load_model(checkpoint)
    assert anonymous_bytes() - before < size / 4
    assert sum(tensor.nbytes for tensor in checkpoint.layout.values()) == size
    assert anonymous_bytes() - before < size / 4
    weight = model.model.layers[0].mlp.up_proj.weight
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.layers.0.mlp.up_proj.weight"), weight)
