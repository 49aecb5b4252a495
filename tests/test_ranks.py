"""Several processes quantize one model: the checkpoint is that of one, byte for byte."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zoo
import zoo_configs as configs

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


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_writes_the_same_bytes(processes, models, of_one, tmp_path):
    script = settings(models, tmp_path / "settings.json", tmp_path / "out")
    done(torchrun(processes, [SCRIPT, script]))
    found = hashes(tmp_path / "out")
    assert [name for name in of_one if found.get(name) != of_one[name]] == []
    assert found.keys() == of_one.keys()
