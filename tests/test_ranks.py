"""Several processes quantize one model: the checkpoint is that of one, byte for byte."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zoo
import zoo_configs as configs

from optq.ranks import Ranks
from optq.record import TIMES

HERE = Path(__file__).parent
SCRIPT = HERE / "ranks_run.py"


def torchrun(processes, command, **options):
    """Start a command in several processes; ``--standalone`` ones talk to nobody else."""
    nodes = options.pop("nodes", ["--standalone"])
    launch = [sys.executable, "-m", "torch.distributed.run", *nodes]
    return subprocess.Popen(
        [*launch, f"--nproc-per-node={processes}", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def done(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-4000:]
    return out


def hashes(folder):
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).glob("*/*"))
        if path.name != TIMES
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("ranks"), {row.name: row for row in zoo.ROWS}
    rows["mixtral"] = zoo.Row("mixtral", configs.mixtral, "", ())
    rows["llama4"] = zoo.Row("llama4", configs.llama4, "", ())
    return {
        name: str(zoo.save(rows[name], folder / name))
        for name in ("llama_bfloat16", "gpt2", "mixtral", "llama4")
    }


def settings(models, path, out):
    """Runs of dense models and of experts, of which some get few tokens; samples are odd."""
    tokens, two = zoo.token_ids(7, 24).tolist(), zoo.token_ids(2, 24).tolist()
    gptq = {"method": "gptq", "calib": tokens}
    runs = {
        "dense qep": gptq | {"model": models["llama_bfloat16"], "quantizer": [3, 32], "qep": True},
        "dense": gptq | {"model": models["gpt2"], "quantizer": [4, -1, False]},
        "rounded": gptq
        | {"model": models["gpt2"], "quantizer": [4, 32], "method": "rtn", "qep": True},
        "experts": gptq | {"model": models["mixtral"], "quantizer": [4, 32], "qep": True},
        "copies": gptq | {"model": models["llama4"], "quantizer": [3, 32], "qep": True},
        "head": gptq
        | {"model": models["llama_bfloat16"], "quantizer": [3, 32], "head": 8, "qep": True},
        "budget": gptq
        | {"model": models["mixtral"], "quantizer": [3.9, None, 32], "method": "mixed"},
        "activations": gptq
        | {"model": models["llama_bfloat16"], "quantizer": [], "method": "smoothquant"},
        "few batches": gptq | {"model": models["mixtral"], "quantizer": [4, 32], "calib": two},
    }
    Path(path).write_text(json.dumps({"batch": 48, "memory": 2**19, "out": str(out), "runs": runs}))
    return path


@pytest.fixture(scope="session")
def of_one(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    script = settings(models, folder / "settings.json", folder / "out")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, script], check=True, env=env)
    return hashes(folder / "out")


@pytest.mark.parametrize("processes", [2, 3])  # four are two machines, below
def test_any_number_of_processes_writes_the_same_bytes(processes, models, of_one, tmp_path):
    script = settings(models, tmp_path / "settings.json", tmp_path / "out")
    done(torchrun(processes, [SCRIPT, script]))
    found = hashes(tmp_path / "out")
    assert [name for name in of_one if found.get(name) != of_one[name]] == []
    assert found.keys() == of_one.keys()


def test_two_machines_that_meet_write_the_same_bytes(models, of_one, tmp_path):
    """Two agents of two processes each, with an address to meet at: here, both on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = settings(models, tmp_path / "settings.json", tmp_path / "out")
    meet = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [torchrun(2, [SCRIPT, script], nodes=[*meet, f"--node-rank={n}"]) for n in (0, 1)]
    for node in nodes:
        done(node)
    assert hashes(tmp_path / "out") == of_one


def test_the_command_is_heard_once(models, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the other end of the theorem is not as near as it seems. " * 40)
    out, options = tmp_path / "out", ["--calib", text, "--nsamples", 4, "--seqlen", 16]
    command = ["-m", "optq", "quantize", models["llama_bfloat16"], out, *options, "--json"]
    printed = done(torchrun(2, command))
    assert json.loads(printed)["out"] == str(out)
    assert (out / "config.json").exists()
    again = torchrun(2, command)
    printed, err = again.communicate(timeout=60)
    assert again.returncode != 0 and not printed
    assert err.count(f"optq: {out} exists\n") == 1 and "exitcode  : 2" in err


def test_a_process_that_is_killed_takes_the_others_along(models, of_one, tmp_path):
    """Within seconds; started again, which torchrun does if that is asked for, they go on."""
    script = settings(models, tmp_path / "settings.json", tmp_path / "out")
    run = torchrun(3, [SCRIPT, script], nodes=["--standalone", "--max-restarts=1"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "dense qep").exists():  # the first run is done
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    done(run)
    assert hashes(tmp_path / "out") == of_one


RESTARTED = """
import os, signal, time, torch
from optq.ranks import together
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    time.sleep(3)  # the other one waits for this meanwhile
    os.kill(os.getpid(), signal.SIGKILL)
with together(torch.device("cpu")) as ranks:
    print("together", ranks.total(1))
"""


def test_a_process_that_died_before_its_run_meets_the_others_after_a_restart(tmp_path):
    (tmp_path / "script.py").write_text(RESTARTED)
    nodes = ["--standalone", "--max-restarts=1"]
    assert done(torchrun(2, [tmp_path / "script.py"], nodes=nodes)).count("together 2") == 2


def test_shares_are_whole_units_and_all_there_is():
    for count in (0, 5, 64, 200, 1344):
        for size in (1, 2, 3, 4):
            bounds = Ranks(0, size).bounds(count, 64)
            assert [n for each in bounds for n in range(count)[each]] == list(range(count))
            assert all(each.start % 64 == 0 for each in bounds if each.start < count)
