"""What `import optq` gives, and what it leaves alone."""

import ast
import json
import os
import pty
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import optq

ROOT = Path(__file__).parents[1]
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
    names = ["GPTQ", "OBQ", "OBS", "QEP", "RTN", "Magnitude", "Mixed", "ModelConfig", "OptqError"]
    names += ["Runner", "SmoothQuant", "SparseGPT", "Tune", "Wanda", "load"]
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


UNUSED = {
    "scipy.optimize",
    "torch._dynamo.symbolic_convert",
    "torch.distributed.tensor",
    "datasets",
}
# What a command leaves out is there for whoever asks.
LATER = """
import sys
from optq.cli import imports
imports.load()
import torch, transformers
assert isinstance(sys.modules["torch._dynamo"], imports._Later)
assert transformers.LlamaForCausalLM and not {unused} & sys.modules.keys()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert "torch._dynamo.symbolic_convert" in sys.modules
import torch.distributed.tensor, torch._dynamo.config
"""


def test_a_command_imports_what_it_uses(tmp_path):
    words = ("quantize", "demo", tmp_path / "out", "--dry-run")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", COMMAND, *words],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.split("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "transformers.modeling_utils" in modules
    assert not UNUSED & modules


def test_what_no_command_uses_is_there_later():
    program = LATER.format(unused=UNUSED)
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", ["demo", "quantize demo OUT", "eval demo", "compare demo", "bench demo"]
)
def test_a_bar_is_there_before_torch_is(words, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [COMMAND, *words.split()],
        check=False,
        cwd=tmp_path,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color", "PYTHONPATH": path},
    )
    os.close(theirs)
    seen = os.read(ours, 4096).decode()
    os.close(ours)
    title = "quantizing" if "quantize" in words else f"optq {words.split()[0]}"
    assert done.returncode == 7 and title in seen and "starting" in seen


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "optq", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "quantize", "eval", "generate", "inspect"):
        assert command in done.stdout


# What is said of the command's options, in words and in messages


def options_by_command() -> dict[str, list[list[str]]]:
    """The names of each option of each command, those that turn it off included."""
    import typer

    from optq import cli

    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    return {
        name: [
            [*parameter.opts, *parameter.secondary_opts]
            for parameter in command.params
            if parameter.opts[0].startswith("--") and parameter.opts != ["--help"]
        ]
        for name, command in commands.items()
    }


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def test_the_table_explains_every_option_once():
    lines = (ROOT / "docs" / "options.md").read_text().splitlines()
    start = lines.index("| option | when to turn it |") + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append(OPTION.findall(line.split("|")[1]))
    named = [name for row in rows for name in row]
    assert len(named) == len(set(named)) > 20
    options = {tuple(names) for each in options_by_command().values() for names in each}
    explained = {names: [name for name in names if name in named] for names in options}
    assert {names for names, found in explained.items() if len(found) != 1} <= {
        ("--actorder", "--no-actorder")  # on, off and left alone are three different things
    }
    assert set(named) <= {name for names in options for name in names}


def test_messages_name_options_that_exist():
    """A remedy that names an option must name one that there is."""
    options = {name for each in options_by_command().values() for names in each for name in names}
    options |= {"--version", "--help"}
    source, seen = ROOT / "src" / "optq", set()
    for path in sorted(source.rglob("*.py")):
        if path == source / "demo" / "train.py":  # a program of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = set(OPTION.findall(node.value))
                assert found <= options, (path.name, node.lineno, found - options)
                seen |= found
    assert {"--skip", "--results", "--nsamples"} <= seen
