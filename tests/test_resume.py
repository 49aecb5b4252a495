"""A run that was cut off goes on from its last whole block, and writes the very same bytes."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import decoder
import pytest
import safetensors.torch
import torch
import zoo
import zoo_configs as configs
from safetensors.torch import load_file, save_file

import optq.quantize
from optq import GPTQ, OBQ, RTN, ModelConfig, Runner
from optq.errors import ModelError, NumericsError, OutputError
from optq.formats import journal, writer
from optq.formats.whole import Whole
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.layer import Layer
from optq.record import TIMES

ROWS = {row.name: row for row in zoo.ROWS}
CALIB = zoo.token_ids(4, 24)
FOUR_BITS = GPTQ.plain(4, 32)
SITES = 4  # of a block of Llama's, which are three


class Cut(BaseException):
    """What ends a run."""


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != TIMES
    }


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A Llama of three blocks, in two files. To be read only."""
    folder = tmp_path_factory.mktemp("resume") / "llama"
    ROWS["llama"].build().save_pretrained(folder, max_shard_size="200KB")
    zoo.tokenizer().save_pretrained(folder)
    assert len([*folder.glob("*.safetensors")]) > 1
    return folder


@pytest.fixture
def said():
    return []


@pytest.fixture
def out(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.fixture
def start(source, out, said):
    """Run; the sites that it solved, as blocks."""

    def run(quantizer=FOUR_BITS, folder=source, at=out, cut=None, **options):
        steps = []

        def progress(step):
            steps.append(step.block)
            if step.block == cut:
                raise Cut

        options = {"calib": CALIB, "notice": said.append} | options
        config = options.pop("config", ModelConfig(str(folder), "cpu"))
        runner = Runner(config, quantizer, output=at, progress=progress, **options)
        if cut is None:
            runner.run()
        else:
            with pytest.raises(Cut):
                runner.run()
        return steps

    return run


def room(out):
    return out.with_name(f".{out.name}.partial")


def only(out):
    return [path.name for path in out.parent.iterdir()] == [out.name]


# The same bytes


def moe(name, folder):
    zoo.Row(name, getattr(configs, name), "", ()).build().save_pretrained(folder)
    return folder


SETTINGS = [
    ("llama_bfloat16", "gptq", GPTQ.plain(2, 32), False),
    ("llama_bfloat16", "gptq", GPTQ(3, 32), True),
    ("llama_bfloat16", "gptq_v2", GPTQ(4, 32, sym=False), True),
    ("qwen2", "gptq_v2", GPTQ(8, -1, sym=False), True),
    ("qwen2", "gptq", GPTQ(4, 32, actorder=True), True),
    ("qwen2", "gptq", GPTQ.plain(4, 32, actorder=True, static_groups=True), False),
    ("qwen2", "compressed-tensors", GPTQ(2, 32), True),
    ("llama_bfloat16", "compressed-tensors", GPTQ(3, -1, sym=False), True),
    ("llama", "compressed-tensors", RTN(8, 32), False),
    ("qwen2", "compressed-tensors", GPTQ(4, 64, static_groups=True, actorder=True), True),
    ("gpt2", "gptq", GPTQ(4, 32), True),
    ("opt_350m", "gptq", GPTQ.plain(3, 32, mse=True), False),
    ("falcon", "gptq", OBQ(4, 32), False),
    ("mixtral", "compressed-tensors", GPTQ(4, 32), True),
    ("qwen3_next", "compressed-tensors", GPTQ(3, 32, sym=False), True),
    ("deepseek_v3", "gptq_v2", GPTQ(2, 32, sym=False), True),
    ("llama4", "gptq", GPTQ.plain(4, 32), True),
    ("gpt_oss", "gptq", GPTQ(8, 32), False),
]


@pytest.mark.parametrize(("name", "form", "quantizer", "qep"), SETTINGS, ids=str)
def test_what_is_read_back_is_what_was_put(
    start, tmp_path, out, monkeypatch, name, form, quantizer, qep
):
    """Every weight, to the bit; and so is all that follows, the records included."""
    folder = tmp_path / "model"
    zoo.save(ROWS[name], folder) if name in ROWS else moe(name, folder)
    puts, put = {}, Layer.put

    def watched(layer, weight):
        put(layer, weight)
        puts[layer.name] = layer.weight.contiguous().view(torch.uint8).clone()

    monkeypatch.setattr(Layer, "put", watched)
    options = {"format": form, "qep": qep, "calib": zoo.token_ids(4, 48)}
    steps = start(quantizer, folder, tmp_path / "alone", **options)
    alone = dict(puts)
    last = max(steps)
    start(quantizer, folder, cut=last, **options)
    puts.clear()
    again = start(quantizer, folder, **options)
    assert {*again} == {last} and puts.keys() == alone.keys()
    assert all(torch.equal(puts[name], alone[name]) for name in alone)
    assert contents(out) == contents(tmp_path / "alone") and only(out)


@pytest.mark.parametrize(("shards", "step"), [(False, 5), (True, 3)])
def test_killed_at_any_moment(start, out, tmp_path, monkeypatch, shards, step):
    """At each call that has something on disk or named: a kill leaves what was there then."""
    if shards:
        monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    start(RTN(4, 32), at=tmp_path / "alone", qep=True)
    alone = contents(tmp_path / "alone")
    assert ("model.safetensors" in alone) is not shards
    calls = {(os, "fsync"): os.fsync, (Path, "rename"): Path.rename, (os, "open"): os.open}
    moment = 0
    while True:
        moment += step
        left = moment

        def dying(call):
            def called(*arguments):
                nonlocal left
                left -= call is not os.open or ".partial" in str(arguments[0])
                if left == 0:
                    raise Cut
                return call(*arguments)

            return called

        with monkeypatch.context() as patch:
            patch.setattr(Whole, "_clear", lambda _: None)  # nobody tidies up after a kill
            for (place, name), call in calls.items():
                patch.setattr(place, name, dying(call))
            with suppress(Cut):
                start(RTN(4, 32), qep=True)
        if left > 0:
            break
        if out.exists() and [*out.iterdir()]:  # it has its name: only a report is missing
            with pytest.raises(OutputError, match="exists"):
                start(RTN(4, 32), qep=True)
        else:
            start(RTN(4, 32), qep=True)
        assert contents(out) == alone and only(out), moment
        shutil.rmtree(out)
    assert moment > 30


def test_a_process_that_is_killed(source, out, tmp_path, said, start):
    """By SIGKILL, with a block on disk: what is left is named, and gone on from."""
    script = f"""if True:
        import os, signal
        import torch, zoo
        from optq import GPTQ, ModelConfig, Runner
        torch.set_num_threads(1)
        def progress(step):
            if step.block == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        Runner(ModelConfig({str(source)!r}, "cpu"), GPTQ.plain(4, 32), calib=zoo.token_ids(4, 24),
            output={str(out)!r}, progress=progress).run()
    """
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    assert done.returncode == -signal.SIGKILL and not out.exists()
    assert {*start()} == {2}
    assert said == [f"going on after 2 of 3 blocks, which {room(out)} holds"]
    start(at=tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone") and only(out)


def test_killed_again_and_again(start, out, tmp_path):
    start(at=tmp_path / "alone", qep=True)
    assert {*start(cut=1, qep=True)} == {0, 1}
    assert {*start(cut=1, qep=True)} == {1}
    assert {*start(cut=2, qep=True)} == {1, 2}
    assert {*start(qep=True)} == {2}
    assert contents(out) == contents(tmp_path / "alone")


def test_with_all_blocks_done_nothing_runs(start, out, tmp_path, monkeypatch):
    """What was killed while the checkpoint was put together needs no forward pass."""
    start(at=tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(Whole, "appear", lambda _: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            start()
    monkeypatch.setattr(Flow, "run", lambda _: pytest.fail("it runs"))
    assert start() == []
    assert contents(out) == contents(tmp_path / "alone")


def test_a_module_that_blocks_share_is_counted_again(start, out, tmp_path, monkeypatch):
    """Its later calls are in the record, and only the pass knows them."""
    model = ROWS["llama"].build()
    model.model.layers[2].mlp = model.model.layers[1].mlp
    shared = ROWS["llama"].build()

    class Shared(type(shared)):
        pass

    load = optq.runner.open_model

    def opened(checkpoint, find):
        model, blocks, shards = load(checkpoint, find)
        blocks[2].module.mlp = blocks[1].module.mlp
        return model, find(model), shards

    monkeypatch.setattr(optq.runner, "open_model", opened)
    start(at=tmp_path / "alone")
    record = json.loads((tmp_path / "alone" / "optq.json").read_text())
    assert 2 in {layer["calls"] for layer in record["layers"]}
    with monkeypatch.context() as patch:
        patch.setattr(Whole, "appear", lambda _: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            start()
    assert start() == []
    assert contents(out) == contents(tmp_path / "alone")


def test_skipped_blocks_have_no_file(start, out, tmp_path):
    options = {"skip": r"layers\.1\."}
    start(at=tmp_path / "alone", **options)
    start(cut=2, **options)
    names = sorted(path.name for path in (room(out) / "blocks").iterdir())
    assert names == ["00000.json", "00000.safetensors", "00001.json"]
    assert {*start(**options)} == {2}
    assert contents(out) == contents(tmp_path / "alone")


# Other arguments


def another_source(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("quantizer", "options", "word"),
    [
        (GPTQ.plain(3, 32), {}, "wbits was 4 and is 3"),
        (GPTQ.plain(4, 16, sym=False), {}, "groupsize was 32 and is 16; sym was on and is off"),
        (RTN(4, 32), {}, "method was gptq and is rtn"),
        (FOUR_BITS, {"qep": True}, "qep was off and is on"),
        (FOUR_BITS, {"format": "gptq_v2"}, "format was gptq and is gptq_v2"),
        (FOUR_BITS, {"skip": "down_proj"}, "skip was off and is down_proj"),
        (FOUR_BITS, {"calib": zoo.token_ids(4, 24, seed=1)}, "the calibration text has changed"),
        (FOUR_BITS, {"calib": CALIB[:2]}, "samples was 4 and is 2"),
    ],
    ids=str,
)
def test_other_arguments_are_refused(start, out, tmp_path, said, quantizer, options, word):
    start(cut=1)
    before = contents(room(out))
    with pytest.raises(OutputError) as refused:
        start(quantizer, **options)
    assert refused.value.cause.startswith(f"{room(out)} holds finished blocks of another run: ")
    assert word in refused.value.cause and "--restart" in refused.value.remedy
    kept = contents(room(out))
    assert before.items() >= kept.items() and before.keys() - kept.keys() <= {"lock"}
    assert {*start()} == {1, 2}  # as it says
    shutil.rmtree(out)
    start(cut=1)
    assert {*start(quantizer, restart=True, **options)} == {0, 1, 2}
    start(quantizer, at=tmp_path / "alone", **options)
    assert contents(out) == contents(tmp_path / "alone") and only(out)


def test_another_dtype_is_refused(start, source):
    start(cut=1)
    with pytest.raises(OutputError, match="dtype was off and is bfloat16"):
        start(config=ModelConfig(str(source), "cpu", "bfloat16"))


@pytest.mark.parametrize("package", ["optq", "torch", "transformers"])
def test_another_version_is_refused(start, monkeypatch, package):
    start(cut=1)
    if package == "optq":
        monkeypatch.setattr(journal, "__version__", "9.9")
    else:
        version = journal.version
        known = lambda name: "9.9" if name == package else version(name)  # noqa: E731
        monkeypatch.setattr(journal, "version", known)
    with pytest.raises(OutputError, match=rf"{package} was .* and is 9\.9"):
        start()


def test_a_source_that_changed_is_refused(start, source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    start(folder=folder, cut=1)
    file = sorted(folder.glob("*.safetensors"))[-1]
    found = file.stat()
    save_file({n: t * 2 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(OutputError, match=f"{file.name} of the source has changed since"):
        start(folder=folder)
    shutil.copy(source / file.name, file)  # the same values, later
    assert file.stat().st_mtime_ns != found.st_mtime_ns
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert config.read_text() != text
    with pytest.raises(OutputError, match=r"the config.json of the source has changed since"):
        start(folder=folder)
    config.write_text(text)
    assert {*start(folder=folder)} == {1, 2}


def test_a_file_of_the_hub_is_known_by_its_revision(source, tmp_path):
    """It may be still to come, and its time is that of a download."""
    snapshot = tmp_path / "snapshots" / "4f3e"
    shutil.copytree(source, snapshot)
    checkpoint = Checkpoint.open(str(snapshot))
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    found = journal.settings(checkpoint, torch.device("cpu"), CALIB)["source"]
    assert len(found) > 1 and all(known == {"revision": "4f3e"} for known in found.values())


def test_a_journal_of_another_version_is_refused(start, out):
    start(cut=1)
    path = room(out) / "journal.jsonl"
    path.write_text(path.read_text().replace('{"journal": 2,', '{"journal": 3,', 1))
    with pytest.raises(OutputError, match=r"is of version 3, and this OPTQ reads 2\n.*--restart"):
        start()
    assert {*start(restart=True)} == {0, 1, 2}


def test_what_else_writes_there_is_refused(start, source, out):
    """An export, say: it would throw hours of work away."""
    start(cut=1)
    result = Runner(ModelConfig(str(source), "cpu"), FOUR_BITS, calib=CALIB).run()
    with pytest.raises(OutputError, match="holds finished blocks of a run of optq quantize"):
        result.save(out)
    assert {*start()} == {1, 2}


def test_force_replaces_after_going_on(start, out, tmp_path):
    start(RTN(4, 32))
    start(cut=1, force=True)
    with pytest.raises(OutputError, match="exists"):
        start()
    assert {*start(force=True)} == {1, 2} and only(out)
    start(at=tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


# Damage


def cut_line(blocks):
    path = blocks.parent / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def bad_line(blocks):
    path = blocks.parent / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[-1][10:]]))


def no_shard(blocks):
    (blocks / "00001.safetensors").unlink()


def bad_shard(blocks):
    path = blocks / "00001.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-7] ^= 1
    path.write_bytes(whole)


def bad_records(blocks):
    path = blocks / "00001.json"
    path.write_text(path.read_text().replace("q_proj", "k_proj"))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (cut_line, None),
        (bad_line, "has a damaged line in the journal"),
        (no_shard, "lacks its 00001.safetensors"),
        (bad_shard, "has a damaged 00001.safetensors"),
        (bad_records, "has a damaged 00001.json"),
    ],
)
def test_a_damaged_block_is_done_again(start, out, tmp_path, said, damage, word):
    start(at=tmp_path / "alone")
    start(cut=2)
    del said[:]
    damage(room(out) / "blocks")
    assert {*start()} == {1, 2}
    expected = [] if word is None else [f"block 2 in {room(out)} {word}: it is done again"]
    assert said == [*expected, f"going on after 1 of 3 blocks, which {room(out)} holds"]
    assert contents(out) == contents(tmp_path / "alone") and only(out)


@pytest.mark.parametrize("text", [b"[]\n[]\n", b"\0\xff\n{}\n"])
def test_a_journal_that_does_not_say_of_which_run_it_is(start, out, text):
    start(cut=2)
    (room(out) / "journal.jsonl").write_bytes(text)
    with pytest.raises(OutputError, match=r"the first line of .*, is damaged") as refused:
        start()
    assert "--restart" in refused.value.remedy
    assert {*start(restart=True)} == {0, 1, 2}


@pytest.mark.parametrize("text", [b"", b"{"])
def test_a_journal_of_which_nothing_is_left(start, out, tmp_path, said, text):
    start(at=tmp_path / "alone")
    start(cut=2)
    (room(out) / "journal.jsonl").write_bytes(text)
    assert {*start()} == {0, 1, 2}
    assert said[-1] == f"no block in {room(out)} was whole: starting anew"
    assert contents(out) == contents(tmp_path / "alone") and only(out)


# What ends a run


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
@pytest.mark.parametrize("block", [0, 1])
def test_an_interrupt_keeps_finished_blocks(source, out, said, start, error, block):
    def progress(step):
        if step.block == block:
            raise error

    with pytest.raises(type(error)):
        config = ModelConfig(str(source), "cpu")
        options = {"calib": CALIB, "notice": said.append, "progress": progress}
        Runner(config, FOUR_BITS, output=out, **options).run()
    kept = f"1 of 3 blocks are kept in {room(out)}: the same command goes on from there,"
    assert said == ([f"{kept} --restart throws them away"] if block else [])
    assert [path.name for path in out.parent.iterdir()] == ([room(out).name] if block else [])


def test_what_the_same_command_would_find_again_keeps_nothing(start, source, out, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    name = "model.layers.2.mlp.up_proj.weight"
    file = folder / Checkpoint.open(str(folder)).files[name]
    tensors = load_file(file)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="block 2"):
        start(folder=folder)
    assert [*out.parent.iterdir()] == []


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("what", ["save_file", "write_text", "fsync", "copy"])
def test_a_full_disk(start, out, tmp_path, said, monkeypatch, what, large):
    """At any write: an error that says so, what is done is kept, and with room it goes on."""
    if large:
        monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    start(at=tmp_path / "alone")
    places = {"save_file": safetensors.torch, "write_text": Path, "fsync": os, "copy": shutil}
    call = getattr(places[what], what)
    failing = 0
    while True:
        left = failing

        def full(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(places[what], what, full)
            if what != "copy" or not out.exists():
                try:
                    start()
                except OutputError as error:
                    assert error.cause == f"the disk of {out} is full"
                    assert error.remedy == "make room, and run again"
        if left >= 0:
            break
        if not out.exists():  # else it has its name, and the disk may not know yet
            start()
        assert contents(out) == contents(tmp_path / "alone") and only(out)
        shutil.rmtree(out)
        failing += 4 if what == "fsync" else 1
    assert failing >= 1


def test_a_shard_of_the_source_that_vanishes(start, source, out, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    files = Checkpoint.open(str(folder)).files
    file = folder / files["model.layers.2.mlp.up_proj.weight"]
    assert files["model.layers.0.mlp.up_proj.weight"] != file.name

    def progress(step):
        if file.exists():
            file.rename(tmp_path / "away")

    options = {"calib": CALIB, "output": out}
    with pytest.raises(ModelError, match=f"{file.name} is missing"):
        Runner(ModelConfig(str(folder), "cpu"), FOUR_BITS, progress=progress, **options).run()
    (tmp_path / "away").rename(file)
    assert 0 not in start(folder=folder)
    start(at=tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


def test_two_runs_on_what_is_left(start, source, out):
    """The second is refused, and touches nothing."""
    start(cut=1)

    def progress(_):
        for restart in (False, True):
            with pytest.raises(OutputError, match="another run is writing"):
                start(restart=restart)

    options = {"calib": CALIB, "output": out, "progress": progress}
    Runner(ModelConfig(str(source), "cpu"), FOUR_BITS, **options).run()
    assert only(out) and len(decoder.decode(out)) == 21


def test_where_there_are_no_locks(start, out, monkeypatch):
    """A run that ended by itself is gone on from; of one that was killed the lock must go."""
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    start(cut=1)
    assert {*start(cut=2)} == {1, 2}
    (room(out) / "lock").touch()
    with pytest.raises(OutputError, match=f"delete {room(out) / 'lock'}"):
        start()
    (room(out) / "lock").unlink()  # as it says
    assert {*start()} == {2} and only(out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_became_read_only(start, out):
    start(cut=1)
    room(out).chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        start()
    room(out).chmod(0o700)
    assert {*start()} == {1, 2}
