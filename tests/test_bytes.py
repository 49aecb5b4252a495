"""The same seed gives the same bytes: those that were recorded, on any x86 processor.

After a change that is meant to move codes, ``python tests/byte_settings.py > tests/bytes.json``
records them anew; the log says which rows moved, and why.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RECORDED = "2.13"  # torch, whose kernels decide the order of sums


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not torch.__version__.startswith(RECORDED),
    reason=f"recorded on x86 with torch {RECORDED}: elsewhere sums have another order",
)
def test_checkpoints_have_the_recorded_bytes():
    script = HERE / "byte_settings.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    hashes, recorded = json.loads(made.stdout), json.loads((HERE / "bytes.json").read_text())
    assert len(recorded) >= 40
    assert [name for name in recorded if hashes.get(name) != recorded[name]] == []
    assert hashes.keys() == recorded.keys()
