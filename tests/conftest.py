"""What every test stands on: seeds, no network, checked shapes, one thread to a worker."""

import os
import random

# Read by huggingface_hub when it is imported, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:  # Two workers with all cores each are slower than with one: also in such commands.
    os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping

# The shapes and dtypes in core's signatures are checked, here and nowhere else. Before any import
# of optq.core: the hook rewrites its modules as they load.
jaxtyping.install_import_hook("optq.core", "beartype.beartype")

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; commands inherit it
if PARALLEL:
    torch.set_num_threads(1)

# The same examples on every run, and no deadline: the first example of a test pays for warm-up.
hypothesis.settings.register_profile("optq", derandomize=True, deadline=None)
hypothesis.settings.load_profile("optq")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
