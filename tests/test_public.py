"""What `import optq` gives, and what it leaves alone."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import optq

COMMAND = Path(sys.executable).with_name("optq")
HEAVY = {"torch", "transformers", "datasets", "numpy", "safetensors", "tokenizers"}

# What changes in the process while optq is imported, and what that takes.
WATCH = """
import json, logging, os, random, signal, sys, time, warnings
def state():
    return [
        dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT),
        list(warnings.filters), list(logging.root.handlers), random.getstate(), list(sys.path),
        os.getcwd(), sys.excepthook,
    ]
before, modules, start = state(), set(sys.modules), time.perf_counter()
import optq
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "unchanged": state() == before,
    "modules": sorted(set(sys.modules) - modules),
}))
"""


def test_the_names_are_these():
    names = ["GPTQ", "OBQ", "QEP", "RTN", "ModelConfig", "OptqError", "Runner", "load"]
    assert optq.__all__ == names
    assert set(optq.__all__) <= set(dir(optq))
    assert optq.__version__.count(".") == 2


@pytest.mark.parametrize("name", optq.__all__)
def test_a_name_is_what_its_module_defines(name):
    found = getattr(optq, name)
    assert found.__name__ == name and found.__doc__
    assert found is getattr(import_module(found.__module__), name)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"module 'optq' has no attribute 'AWQ'"):
        _ = optq.AWQ
    with pytest.raises(ImportError):
        exec("from optq import AWQ")


def test_a_star_brings_the_public_names_only():
    names: dict = {}
    exec("from optq import *", names)
    assert set(names) - {"__builtins__"} == set(optq.__all__)


def test_importing_does_nothing_else():
    runs = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", WATCH], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and done.stderr == ""
        runs.append(json.loads(done.stdout))
    for run in runs:
        assert run["unchanged"]
        assert [name for name in run["modules"] if name.startswith("optq")] == ["optq"]
        assert not HEAVY & set(run["modules"])
    assert min(run["seconds"] for run in runs) < 0.1


def test_help_is_quick():
    """Asserts what is loaded; a stopwatch around it would time the machine."""
    for words in (["--help"], ["quantize", "--help"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", COMMAND, *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and "Usage: optq" in done.stdout
        lines = [line.split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
        modules = {name.strip().split(".")[0] for _, _, name in lines}
        assert "typer" in modules and not HEAVY & modules


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "optq", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "quantize", "eval", "generate", "inspect"):
        assert command in done.stdout
