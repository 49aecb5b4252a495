"""bench/gpu.py where there is no GPU: what of it can run, runs."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.py"
STAGES = ("forward", "Hessian", "factor", "solve", "(sweep)", "polish", "block")

if find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("Triton does not interpret", allow_module_level=True)


def run(*words):
    command = [sys.executable, str(SCRIPT), *words]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_one_block_of_each_model_is_timed_by_stage():
    result = run("--tiny")
    assert result.returncode == 0, result.stderr
    assert "the column loop agrees with torch's operations" in result.stderr
    head, *lines = result.stdout.splitlines()
    assert head.split()[3:10] == list(STAGES)
    shapes = [line[:15].strip() for line in lines]
    assert shapes == ["Llama 3 8B", "Llama 3 8B", "Qwen3 30B A3B", "OPT 175B"]
    assert lines[1][15:].split()[0] == "torch"
    for line in lines:
        _, *numbers = line[15:].split()
        found = dict(zip(STAGES, map(float, numbers), strict=True))
        parts = sum(found[stage] for stage in STAGES if stage not in ("(sweep)", "block"))
        assert 0 < found["(sweep)"] < found["solve"], line
        assert found["block"] / 2 < parts < found["block"] + 0.01, line


def test_without_a_gpu_it_says_so():
    result = run()
    assert result.returncode == 2 and "needs an NVIDIA GPU" in result.stderr
