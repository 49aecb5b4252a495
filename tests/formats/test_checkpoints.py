"""Checkpoints written and read back: whole or not at all, with all that belongs to the model."""

import errno
import json
import shutil
from pathlib import Path

import decoder
import numpy as np
import pytest
import safetensors.torch
import torch
import zoo
from core.checks import solved
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from optq import ModelConfig, Runner
from optq.core.rtn import RTN
from optq.errors import ModelError, NumericsError, OutputError
from optq.formats import FORMATS, detect, reader, writer
from optq.formats.describe import describe
from optq.formats.export import export
from optq.formats.gptq import GPTQ_V1, GPTQ_V2
from optq.formats.place import place_of
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.dense import LeftOver
from optq.model.linear import QuantizedLinear
from optq.model.names import disk_names
from optq.model.source import load_model
from optq.record import TIMES, RunRecord

BY_NAME = {row.name: row for row in (*zoo.ROWS, *zoo.MULTIMODAL)}
QUANTIZER = RTN(4, 32)
SCHEME = QUANTIZER.scheme()
TOKENS = zoo.token_ids(2, 16)
VERSIONS = (GPTQ_V1, GPTQ_V2)
RECORD = RunRecord(
    optq="0.1.0",
    method="rtn",
    quantizer={},
    qep=None,
    calibration={},
    bits_per_weight=5.0,
    bytes=0,
    dense=[],
    layers=[],
)


@pytest.fixture
def source(tmp_path):
    return zoo.save(BY_NAME["llama"], tmp_path / "source")


def solve_all(folder, quantizer=QUANTIZER, form=FORMATS["gptq"], skip=None):
    """``{name on disk: solution}`` and the names of dense layers, rounding without calibration."""
    checkpoint = Checkpoint.open(str(folder))
    model = load_model(checkpoint)
    names = disk_names(model, checkpoint.files)
    solutions = {}
    blocks = find_blocks(model, skip)
    for layer in (layer for block in blocks for layer in block.layers):
        weight = layer.weight.float()
        solution = solved(quantizer, weight, torch.eye(weight.shape[1]), form.storage(model.dtype))
        solutions[names[f"{layer.name}.weight"].removesuffix(".weight")] = solution
    linears = [names[f"{n}.weight"].removesuffix(".weight") for b in blocks for n in b.linears]
    return solutions, [name for name in linears if name not in solutions]


def commit(out, solutions):
    for name, solution in solutions.items():
        out.commit({name: (solution, SCHEME)})


def write(folder, target, form=FORMATS["gptq"], force=False, skip=None):
    solutions, dense = solve_all(folder, form=form, skip=skip)
    source = Checkpoint.open(str(folder))
    with place_of(Path(target), source, force) as place:
        out = writer.Writer(place, source, form, torch.float32)
        commit(out, solutions)
        out.finish(LeftOver(dense), record=RECORD)
    return solutions


def parts_of(folder):
    """The quantized layers of a checkpoint, and all other tensors."""
    checkpoint = Checkpoint.open(str(folder))
    layers = {n: reader.read_layer(checkpoint, n) for n in reader.quantized_layers(checkpoint)}
    inside = {f"{name}.{suffix}" for name in layers for suffix in GPTQ_V1.suffixes}
    others = {n: t for n, t in checkpoint.tensors() if n not in inside}
    return layers, others


def logits(model):
    with torch.no_grad():
        return model(zoo.token_ids()).logits


def contents(folder):
    files = (path for path in sorted(folder.iterdir()) if path.name != TIMES)
    return {path.name: path.read_bytes() for path in files}


def everything_beside(source):
    return sorted(path.name for path in source.parent.iterdir())


@pytest.mark.parametrize("form", VERSIONS, ids=lambda form: form.name)
@pytest.mark.parametrize("name", ["llama", "gpt2", "llava", "qwen2_vl", "llama_bfloat16"])
def test_a_written_checkpoint_reads_back(tmp_path, form, name):
    source = zoo.save(BY_NAME[name], tmp_path / "source")
    solutions = write(source, tmp_path / "out", form)
    decoded = decoder.decode(tmp_path / "out")
    assert decoded.keys() == solutions.keys()
    layers, others = parts_of(tmp_path / "out")
    assert layers.keys() == solutions.keys()
    for layer, solution in solutions.items():
        np.testing.assert_array_equal(decoded[layer].astype(np.float32), solution.weight.numpy())
        assert torch.equal(layers[layer].weight, solution.weight)
    plain = dict(Checkpoint.open(str(source)).tensors())
    assert others.keys() == plain.keys() - {f"{layer}.weight" for layer in solutions}
    for tensor in others:
        assert torch.equal(others[tensor], plain[tensor])
        assert others[tensor].dtype == plain[tensor].dtype

    model = reader.load_checkpoint(Checkpoint.open(str(tmp_path / "out")))
    checkpoint = Checkpoint.open(str(source))
    dense = {f"{layer}.weight": s.weight for layer, s in solutions.items()}
    for in_model, on_disk in disk_names(load_model(checkpoint), checkpoint.files).items():
        place, _, attribute = in_model.rpartition(".")
        tensor = getattr(model.get_submodule(place), attribute)
        if on_disk in dense:
            assert isinstance(model.get_submodule(place), QuantizedLinear)
            assert torch.equal(tensor, dense[on_disk].to(BY_NAME[name].dtype))
        else:
            assert torch.equal(tensor, plain[on_disk])


def test_the_config_is_said_twice_and_holds_no_path(source, tmp_path):
    write(source, tmp_path / "out", skip=r"0\.mlp|k_proj")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    plain = json.loads((source / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == plain
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == settings
    assert len(settings["dynamic"]) == 3 + (len(BY_NAME["llama"].build().model.layers))
    inside = [name for names in settings["modules_in_block_to_quantize"] for name in names]
    assert "mlp.up_proj" in inside and "self_attn.k_proj" not in inside
    for path in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name


def test_shards_with_an_index(source, tmp_path, monkeypatch):
    write(source, tmp_path / "whole")
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    write(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    found, size = {}, 0
    for name in files:
        tensors = load_file(tmp_path / "out" / name)
        found |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert index["weight_map"] == found and index["metadata"]["total_size"] == size
    whole, sharded = decoder.decode(tmp_path / "whole"), decoder.decode(tmp_path / "out")
    assert whole.keys() == sharded.keys()
    assert all(np.array_equal(whole[name], sharded[name]) for name in whole)
    a, b = (
        reader.load_checkpoint(Checkpoint.open(str(tmp_path / name))) for name in ("whole", "out")
    )
    assert dict(a.named_buffers()).keys() == dict(b.named_buffers()).keys() != set()
    pairs = [*zip(a.buffers(), b.buffers(), strict=True)]
    pairs += zip(a.parameters(), b.parameters(), strict=True)
    assert len(pairs) > 20 and all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("shard_bytes", [20_000, 2**30])
def test_the_same_bytes_twice(source, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(writer, "SHARD_BYTES", shard_bytes)
    write(source, tmp_path / "one")
    write(source, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_companions_travel(source, tmp_path):
    extra = {
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"temperature": 0.5}',
        "LICENSE": "free",
        "modeling_tiny.py": "x = 1",
        "unknown.xyz": "?",
    }
    for name, text in extra.items():
        (source / name).write_text(text)
    (source / "pytorch_model.bin").write_text("the same weights again")
    (source / ".cache").write_text("hidden")
    write(source, tmp_path / "out")
    found = contents_of_files(tmp_path / "out")
    assert {name: found.get(name) for name in extra} == extra
    for path in source.glob("tokenizer*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert "pytorch_model.bin" not in found and ".cache" not in found


def contents_of_files(folder):
    return {
        path.name: path.read_text(errors="replace") for path in folder.iterdir() if path.is_file()
    }


def test_named_chat_templates_travel(source, tmp_path):
    """transformers keeps further chat templates in a folder of their own."""
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    write(source, tmp_path / "out")
    copied = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    assert copied.is_file() and copied.read_text() == "{{ tools }}"


def test_tied_weights_are_not_duplicated(tmp_path):
    source = zoo.save(BY_NAME["llama_tied"], tmp_path / "source")
    write(source, tmp_path / "out")
    names = Checkpoint.open(str(tmp_path / "out")).files
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = reader.load_checkpoint(Checkpoint.open(str(tmp_path / "out")))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tied_weights_of_torch_save(tmp_path, zipped):
    """There both names stand for one storage, which safetensors does not write as it is."""
    source = zoo.save(BY_NAME["llama_tied"], tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (source / "model.safetensors").unlink()
    write(source, tmp_path / "out")
    model = reader.load_checkpoint(Checkpoint.open(str(tmp_path / "out")))
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_views_of_torch_save(tmp_path):
    """Tensors of a ``.bin`` file may be views of one storage."""
    source = zoo.save(BY_NAME["llama"], tmp_path / "source")
    state = load_file(source / "model.safetensors")
    norms = sorted(name for name in state if "norm" in name)
    together = torch.stack([state[name] for name in norms])
    state |= dict(zip(norms, together.unbind(), strict=True))
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    write(source, tmp_path / "out")
    others = parts_of(tmp_path / "out")[1]
    assert all(torch.equal(others[name], state[name]) for name in norms)


def test_an_existing_target_is_kept_without_force(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        write(source, out)
    assert contents_of_files(out) == {"config.json": "{}", "mine": "mine"}
    assert everything_beside(source) == ["out", "source"]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_force_replaces(source, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
        (out / "config.json").write_text("{}")
    else:
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    write(source, out, force=True)
    assert decoder.decode(out) and not (out / "mine").exists()
    left = {"out", "source"} | ({"elsewhere"} if kind == "link" else set())
    assert set(everything_beside(source)) == left


def test_force_does_not_replace_what_is_no_checkpoint(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no checkpoint"):
        write(source, out, force=True)
    with pytest.raises(OutputError, match="holds no checkpoint"):
        write(source, out / "thesis.txt", force=True)
    assert contents_of_files(out) == {"thesis.txt": "mine"}


def test_ctrl_c_between_the_renames_brings_the_old_checkpoint_back(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(source, out)
    before, rename = contents(out), Path.rename

    def interrupted(self, target):
        result = rename(self, target)
        if Path(target).name == "old":
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(source, out, force=True)
    assert contents(out) == before
    assert everything_beside(source) == ["out", "source"]


def test_nan_in_a_tensor_that_stays_dense_is_named(source, tmp_path):
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][3] = torch.nan
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.norm\.weight"):
        write(source, tmp_path / "out")
    assert everything_beside(source) == ["source"]


@pytest.mark.parametrize("place", ["source", "parent", "link"])
def test_the_model_itself_is_never_replaced(source, tmp_path, place):
    """Not even with force, and not as a part of what is replaced."""
    before = contents(source)
    target = {"source": source, "parent": source.parent, "link": tmp_path / "link"}[place]
    if place == "link":
        target.symlink_to(source)
    with pytest.raises(OutputError):
        write(source, target, force=True)
    assert contents(source) == before


def test_a_target_below_folders_that_are_not_there_yet(source, tmp_path):
    write(source, tmp_path / "a" / "b" / "out")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_target_inside_a_file(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a folder"):
        write(source, tmp_path / "file" / "out")


FAILURES = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), "is full"),
    "disk full in safetensors": (
        SafetensorError("Error while serializing: IoError(Os { code: 28, No space left })"),
        "is full",
    ),
    "too large": (OSError(errno.EFBIG, "File too large"), "limit on the size of a file"),
    "too large in safetensors": (
        SafetensorError("I/O error: File too large (os error 27)"),
        "limit on the size of a file",
    ),
    "read only": (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
}
PLACES = ["save_file", "write_text", "copy", "mkdir", "rename"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("force", [False, True])
def test_a_failing_disk_leaves_nothing_behind(source, tmp_path, monkeypatch, place, failure, force):
    error, message = FAILURES[failure]
    out = tmp_path / "out"
    if force:
        out.mkdir()
        (out / "mine").write_text("mine")
        (out / "config.json").write_text("{}")
    solutions, dense = solve_all(source)

    def fail(*args, **options):
        raise error

    where = {
        "save_file": (safetensors.torch, "save_file"),
        "write_text": (Path, "write_text"),
        "copy": (shutil, "copy"),
        "mkdir": (Path, "mkdir"),
        "rename": (Path, "rename"),
    }[place]
    checkpoint, form = Checkpoint.open(str(source)), FORMATS["gptq"]
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with (
            pytest.raises(OutputError, match=message) as caught,
            place_of(out, checkpoint, force) as place,
        ):
            made = writer.Writer(place, checkpoint, form, torch.float32)
            commit(made, solutions)
            made.finish(LeftOver(dense), record=RECORD)
    assert caught.value.__cause__ is error and "\n" not in caught.value.cause
    assert everything_beside(source) == (["out", "source"] if force else ["source"])
    if force:
        assert contents_of_files(out) == {"config.json": "{}", "mine": "mine"}


def test_the_old_checkpoint_comes_back_if_the_last_rename_fails(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    (out / "config.json").write_text("{}")
    rename = Path.rename

    def fail(self, target):
        if Path(target) == out and self.name == "whole":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError):
        write(source, out, force=True)
    assert out.exists() and contents_of_files(out) == {"config.json": "{}", "mine": "mine"}
    assert everything_beside(source) == ["out", "source"]


@pytest.mark.parametrize("error", [RuntimeError("solver"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_caller_leaves_nothing_behind(source, tmp_path, monkeypatch, error):
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    solutions, _ = solve_all(source)
    form, checkpoint = FORMATS["gptq"], Checkpoint.open(str(source))
    with (
        pytest.raises(type(error)),
        place_of(tmp_path / "out", checkpoint, False) as place,
    ):
        commit(writer.Writer(place, checkpoint, form, torch.float32), solutions)
        assert len(everything_beside(source)) == 2  # under way, in a hidden folder
        assert not (tmp_path / "out").exists()
        raise error
    assert everything_beside(source) == ["source"]


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_what_reads_back_wrong_is_noticed(source, tmp_path, monkeypatch, part):
    def flip(tensors, path, **options):
        name = next((name for name in tensors if name.endswith(part)), None)
        if name is not None:
            changed = tensors[name].clone()
            changed.view(torch.int16).view(-1)[0] ^= 1
            tensors = tensors | {name: changed}
        save_file(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", flip)
    with pytest.raises((OutputError), match="reads back"):
        write(source, tmp_path / "out")
    assert everything_beside(source) == ["source"]


@pytest.mark.parametrize("zeros", [False, True])
def test_what_reads_back_shorter_is_noticed(source, tmp_path, monkeypatch, zeros):
    """A disk that lies: the file is cut, or its end is zeros."""

    def cut(tensors, path, **options):
        save_file(tensors, path, **options)
        data = path.read_bytes()
        path.write_bytes(data[:-5000] + (bytes(5000) if zeros else b""))

    monkeypatch.setattr(safetensors.torch, "save_file", cut)
    with pytest.raises(OutputError):
        write(source, tmp_path / "out")
    assert everything_beside(source) == ["source"]


# Reading.


def edited(folder, edit):
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})
    return Checkpoint.open(str(folder))


@pytest.fixture
def quantized(source, tmp_path):
    write(source, tmp_path / "out")
    return tmp_path / "out"


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_missing_part_is_named(quantized, part):
    checkpoint = edited(quantized, lambda state: state.pop(f"{LAYER}.{part}"))
    with pytest.raises(ModelError, match=LAYER):
        reader.load_checkpoint(checkpoint)


def test_a_missing_layer_is_named(quantized):
    def edit(state):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del state[f"{LAYER}.{part}"]

    with pytest.raises(ModelError, match=LAYER):
        reader.load_checkpoint(edited(quantized, edit))


def test_a_missing_dense_tensor_is_named(quantized):
    checkpoint = edited(quantized, lambda state: state.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        reader.load_checkpoint(checkpoint)


def test_a_layer_without_a_place_is_named(quantized):
    def edit(state):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            state[f"model.layers.1.mlp.extra.{part}"] = state[f"{LAYER}.{part}"].clone()

    with pytest.raises(ModelError, match=r"mlp\.extra"):
        reader.load_checkpoint(edited(quantized, edit))


@pytest.mark.parametrize("part", ["weight", "perm", "rotation"])
def test_a_tensor_left_over_of_a_packed_layer_is_named(quantized, part):
    """A reader that ignores one may show another model than was written."""
    name = f"{LAYER}.{part}"
    checkpoint = edited(quantized, lambda state: state.update({name: torch.zeros(4, 4)}))
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        reader.load_checkpoint(checkpoint)


def test_a_bias_that_only_the_file_has_is_added(quantized):
    """AutoGPTQ gave every layer one, of zeros; another value is the quantizer's will."""
    before = logits(reader.load_checkpoint(Checkpoint.open(str(quantized))))
    rows = load_file(quantized / "model.safetensors")[f"{LAYER}.scales"].shape[1]
    zeros = edited(quantized, lambda state: state.update({f"{LAYER}.bias": torch.zeros(rows)}))
    assert torch.equal(logits(reader.load_checkpoint(zeros)), before)
    ones = edited(quantized, lambda state: state.update({f"{LAYER}.bias": torch.ones(rows)}))
    model = reader.load_checkpoint(ones)
    assert torch.equal(model.get_submodule(LAYER).bias, torch.ones(rows))
    assert not torch.equal(logits(model), before)


SURPLUS = {
    "v_head.summary.weight": (1, 64),  # of trl's models with a value head
    "v_head.summary.bias": (1,),
    "mtp.fc.weight": (64, 128),
    "mtp.layers.0.mlp.up_proj.weight": (128, 64),
    "mtp.norm.weight": (64,),
    "model.layers.61.mlp.up_proj.weight": (128, 64),
}


@pytest.mark.parametrize("form", FORMATS)
def test_what_the_model_does_not_load_travels_dense_and_declared(source, tmp_path, form):
    state = load_file(source / "model.safetensors")
    surplus = {name: torch.randn(shape) for name, shape in SURPLUS.items()}
    config = ModelConfig(str(source), device="cpu")
    Runner(config, QUANTIZER, calib=TOKENS, format=form, output=tmp_path / "plain").run()
    save_file(state | surplus, source / "model.safetensors", metadata={"format": "pt"})
    Runner(config, QUANTIZER, calib=TOKENS, format=form, output=tmp_path / "out").run()
    for other in FORMATS:
        checkpoint = Checkpoint.open(str(tmp_path / "out"))
        if other != form:
            export(checkpoint, tmp_path / other, FORMATS[other])
            checkpoint = Checkpoint.open(str(tmp_path / other))
        written = dict(checkpoint.tensors(list(surplus)))
        assert all(torch.equal(written[name], surplus[name]) for name in surplus)
        settings = checkpoint.config()["quantization_config"]
        scheme, layers = detect(checkpoint), reader.quantized_layers(checkpoint)
        assert all(scheme.layer(name) is not None for name in layers)
        matrices = [n.removesuffix(".weight") for n, shape in SURPLUS.items() if len(shape) == 2]
        assert [scheme.layer(name) for name in matrices] == [None] * 4
        if other == "compressed-tensors":
            assert settings["ignore"][-1] == "re:.*mtp.*" and {*matrices} < {*settings["ignore"]}
        else:
            assert any("mtp" in rule for rule in settings["dynamic"])
            assert len(settings["modules_in_block_to_quantize"]) == 7
        plain = reader.load_checkpoint(Checkpoint.open(str(tmp_path / "plain")))
        assert torch.equal(logits(reader.load_checkpoint(checkpoint)), logits(plain))


def test_parts_of_the_wrong_shape_are_refused(quantized):
    def edit(state):
        state[f"{LAYER}.scales"] = state[f"{LAYER}.scales"][:-1].clone()

    with pytest.raises(ModelError, match=LAYER):
        reader.load_checkpoint(edited(quantized, edit))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"+:.*up_proj": {"bits": 8}}, r"up_proj\..* where .* fits 8 bits"),
        ({"+:.*up_proj": {"group_size": 16}}, r"up_proj\..* groups of 16"),
        ({"-:.*up_proj": {}}, "up_proj is packed, and config.json says that it is not"),
    ],
)
def test_a_config_that_contradicts_the_codes_is_refused(quantized, rules, message):
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["dynamic"] = rules
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        reader.load_checkpoint(Checkpoint.open(str(quantized)))


def test_groups_out_of_range_are_refused(quantized):
    def edit(state):
        state[f"{LAYER}.g_idx"][5] = 7

    with pytest.raises(ModelError, match=f"{LAYER}.g_idx names groups outside"):
        reader.load_checkpoint(edited(quantized, edit))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", lambda t: t.half(), "qweight is torch.float16"),
        ("qweight", lambda t: t.to(torch.int64), "qweight is torch.int64"),
        ("qweight", lambda t: t.flatten(), "2 axes belongs"),
        ("qzeros", lambda t: t.float(), "qzeros is torch.float32"),
        ("g_idx", lambda t: t.float(), "g_idx is torch.float32"),
        ("g_idx", lambda t: t - 1, "names groups outside"),
        ("scales", lambda t: t.to(torch.int32), "scales is torch.int32"),
        ("scales", lambda t: t * float("nan"), "hold NaN or infinity"),
    ],
)
def test_damaged_parts_are_refused(quantized, part, change, message):
    def edit(state):
        state[f"{LAYER}.{part}"] = change(state[f"{LAYER}.{part}"]).contiguous()

    with pytest.raises(ModelError, match=message):
        reader.load_checkpoint(edited(quantized, edit))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 4.0, "4.0 bits"),
        ("bits", "4", "4 bits"),
        ("group_size", None, "groups of None"),
        ("dynamic", ["+:up"], "are no rules"),
        ("dynamic", {"+:up": None}, "are no rules"),
    ],
)
def test_damaged_settings_are_refused(quantized, key, value, message):
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"][key] = value
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        reader.load_checkpoint(Checkpoint.open(str(quantized)))


def test_a_quantized_config_on_a_plain_model_is_refused(source, quantized):
    settings = json.loads((quantized / "config.json").read_text())["quantization_config"]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=r"no layer of .* is packed"):
        reader.load_checkpoint(Checkpoint.open(str(source)))


def test_a_dtype_without_a_kernel_is_refused(quantized):
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    with pytest.raises(ModelError, match=r"no kernel for torch\.float64"):
        reader.load_checkpoint(Checkpoint.open(str(quantized)))


def test_layers_of_another_shape_are_refused(quantized):
    config = json.loads((quantized / "config.json").read_text())
    config["intermediate_size"] *= 2
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"mlp\.\w+_proj is .* where the model has"):
        reader.load_checkpoint(Checkpoint.open(str(quantized)))


def test_a_model_on_packed_weights_is_not_saved(quantized, tmp_path):
    model = reader.load_checkpoint(Checkpoint.open(str(quantized)))
    with pytest.raises(ModelError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))


def test_a_plain_model_is_just_loaded(source):
    checkpoint = Checkpoint.open(str(source))
    loaded = reader.load_checkpoint(checkpoint).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in BY_NAME["llama"].build().state_dict().items())
    with pytest.raises(ModelError, match="is not quantized"):
        reader.read_layer(checkpoint, LAYER)


def test_describe(source, quantized):
    plain = describe(Checkpoint.open(str(source)))
    assert plain["format"] == "not quantized" and plain["layers"] == []
    assert plain["architecture"] == "LlamaForCausalLM" and plain["files"] == 1
    what = describe(Checkpoint.open(str(quantized)))
    blocks = len(BY_NAME["llama"].build().model.layers)
    assert what["format"] == "gptq" and what["bits"] == 4 and what["group_size"] == 32
    assert what["sym"] is True and what["desc_act"] is False
    assert what["quantized_layers"] == 7 * blocks and what["bits_per_weight"] == 5.0
    state = load_file(quantized / "model.safetensors")
    assert what["bytes"] == sum(tensor.nbytes for tensor in state.values()) < plain["bytes"]
    parts = [n for n in state if n.rsplit(".", 1)[1] in {"qweight", "qzeros", "scales", "g_idx"}]
    assert what["quantized_bytes"] == sum(state[name].nbytes for name in parts)
    (quantized / "optq.json").unlink()
    assert describe(Checkpoint.open(str(quantized)))["layers"] == []
