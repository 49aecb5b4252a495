"""Many rows on a CPU: what is unpacked into oneDNN's blocks is the dequantized weight."""

import copy
import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels.test_conformance import MANY, dense, exact, make_weight, relative

from optq.kernels import cpu_blocks, cpu_int4

unpack = pytest.importorskip("optq.kernels.unpack")
BLOCKED = cpu_int4._tile() == cpu_blocks.TILE and cpu_blocks.scratch(64, 64) is not None
blocked = pytest.mark.skipif(not BLOCKED, reason="oneDNN has other blocks on this processor")
SHAPES = [(64, 128, 32), (128, 512, -1), (600, 64, 64), (33, 70, -1), (200, 96, 32)]


@pytest.fixture(params=["amx", "blocks"])
def way(request, monkeypatch):
    """Each of the two ways, of which a processor has one or both."""
    if request.param == "amx" and cpu_blocks.tiles() is None:
        pytest.skip("this processor has no AMX")
    if request.param == "blocks":
        monkeypatch.setattr(cpu_blocks, "tiles", lambda: None)
    return request.param


def through_blocks(product):
    """What the weight is there: each column alone, so that nothing is summed."""
    return product._once(torch.eye(product.cols, dtype=torch.bfloat16)).T


@blocked
@pytest.mark.parametrize("rows", [cpu_blocks.ROWS, 64])  # one part, and several, the last shorter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_weight_is_the_dequantized_one(shape, rows, way, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "ROWS", rows)
    for wbits, sym, permuted in itertools.product((2, 3, 4, 8), (True, False), (False, True)):
        weight = make_weight(*shape, wbits, sym, permuted)
        product = cpu_int4.Int4Product(weight, torch.bfloat16)
        order = slice(None) if product.order is None else product.order
        assert torch.equal(through_blocks(product), dense(weight, torch.bfloat16)[:, order])


@blocked
def test_it_is_taken_past_few_rows(way):
    weight = make_weight(600, 256, 64, 4, False, True)
    product = cpu_int4.Int4Product(weight, torch.bfloat16)
    taken = []
    once = product._once
    product._once = lambda x: taken.append(len(x)) or once(x)
    few = cpu_int4.few()
    inputs = torch.randn(MANY, 256)
    for x in (inputs[:few].bfloat16(), inputs[: few + 1].bfloat16(), inputs, inputs.half()):
        assert relative(product(x), x.double() @ exact(weight).T) < 6e-3
    assert taken == [few + 1]
    x = inputs.bfloat16().requires_grad_()
    product(x).sum().backward()  # through torch's own operations
    assert relative(x.grad, exact(weight).sum(0).expand_as(x)) < 1e-2
    assert taken == [few + 1]


@pytest.mark.parametrize("rows", [20, MANY])
@pytest.mark.parametrize("missing", ["loops", "layout", "operators"])
def test_without_it_results_are_right(missing, rows, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "_kept", cpu_blocks._Kept())
    monkeypatch.setattr(cpu_blocks, "tiles", lambda: None)
    if missing == "loops":
        monkeypatch.setattr(cpu_blocks, "loops", lambda: None)
    elif missing == "layout":  # plain rows, as on processors without bfloat16 products
        plain = torch.zeros(128, 256, dtype=torch.bfloat16)
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *_: plain)
        monkeypatch.setattr(torch.ops.mkldnn, "_nbytes", lambda weight: weight.nbytes)
        monkeypatch.setattr(torch.ops.mkldnn, "data_ptr", lambda weight: weight.data_ptr())
    else:
        absent = torch.ops.mkldnn.__getattr__
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *_: absent("none"))
    weight = make_weight(128, 256, 64, 4, False, False)
    product = cpu_int4.Int4Product(weight, torch.bfloat16)
    x = torch.randn(rows, 256).bfloat16()
    assert product._once(x) is None
    assert relative(product(x), x.double() @ exact(weight).T) < 6e-3


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("halves", [True, False])
def test_words_of_either_layout(halves, native, monkeypatch):
    """Rounded by the processor's own instruction, where there is one, and by any other."""
    numba = pytest.importorskip("numba")
    if not native:
        monkeypatch.setattr(unpack, "_words_natively", unpack._words)
    loop = numba.njit(unpack._unpack.py_func)
    rng = np.random.default_rng(0)
    tiles, cols, groups = 3, 64, 2
    codes = rng.integers(256, size=(tiles, cols, 32), dtype=np.uint8)
    units = torch.randn(groups, tiles * 64, 2).bfloat16()
    zeros = rng.integers(16, size=(1, tiles * 64), dtype=np.uint8)
    words = np.zeros((2, cols, 32), np.uint32)  # the last two tiles
    bits = units.view(torch.int16).numpy().view(np.uint16)
    loop(codes, None, bits, zeros, 3, 1, halves, words)
    values = np.concatenate([codes & 15, codes >> 4], 2).astype(np.float32)  # [tiles, cols, 64]
    values = torch.from_numpy(values) - torch.from_numpy(zeros).view(tiles, 1, 64) - 3
    scales = units[..., 0].float().view(groups, tiles, 1, 64).expand(-1, -1, cols // groups, -1)
    expected = (values * scales.transpose(0, 1).reshape(tiles, cols, 64)).bfloat16()[1:]
    found = torch.from_numpy(words).view(torch.bfloat16)
    pairs, order = cols // 2, (0, 2, 4, 1, 3) if halves else (0, 1, 4, 2, 3)
    found = found.view((2, 2, pairs, 32, 2) if halves else (2, pairs, 2, 32, 2)).permute(order)
    assert torch.equal(found.reshape(2, cols, 64), expected)


@blocked
def test_a_copy_has_views_of_its_own(way):
    weight = make_weight(64, 128, 32, 4, True, False)
    product = cpu_int4.Int4Product(weight, torch.bfloat16)
    before = through_blocks(product)
    copied = copy.deepcopy(product)
    assert "_viewed" in product.__dict__ and "_viewed" not in copied.__dict__
    copied.codes0.zero_()
    assert torch.equal(through_blocks(product), before)
    assert not torch.equal(through_blocks(copied), before)


@blocked
def test_threads_stay_as_they_are(way):
    threads, found = torch.get_num_threads(), []
    weight = make_weight(600, 256, 64, 4, True, False)
    product = cpu_int4.Int4Product(weight, torch.bfloat16)
    try:
        for count in (1, threads, threads + 3):
            torch.set_num_threads(count)
            found.append(through_blocks(product))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("tokens", [5, 33, 256, 257])
def test_amx_takes_any_number_of_rows_and_leaves_nothing_behind(tokens):
    """oneDNN finds its own tiles again."""
    if cpu_blocks.tiles() is None:
        pytest.skip("this processor has no AMX")
    weight = make_weight(600, 1056, 32, 4, False, False)
    product = cpu_int4.Int4Product(weight, torch.bfloat16)
    x, other = torch.randn(tokens, 1056).bfloat16(), torch.randn(600, 1056).bfloat16()
    before = torch.nn.functional.linear(x, other)
    assert relative(product(x), x.double() @ exact(weight).T) < 6e-3
    assert torch.equal(torch.nn.functional.linear(x, other), before)


def test_what_is_compiled_into_the_other_file_changes_it():
    """Numba compiles a file's functions anew when that file changes, not one that it calls."""
    amx = pytest.importorskip("optq.kernels.amx")
    assert hashlib.sha256(Path(unpack.__file__).read_bytes()).hexdigest()[:16] == amx.UNPACK


@blocked
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_multiplies_in_another_way():
    """OpenMP would end it."""
    code = (
        "import os, torch\n"
        "from kernels.test_conformance import make_weight\n"
        "from optq.kernels.cpu_int4 import Int4Product\n"
        "torch.set_num_threads(1)\n"
        "product = Int4Product(make_weight(64, 128, 32, 4, True, False), torch.bfloat16)\n"
        "x = torch.eye(128, dtype=torch.bfloat16)\n"
        "made = product(x)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(not torch.equal(product(x), made))\n"
        "print(os.waitpid(child, 0)[1])"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    made = subprocess.run(
        [sys.executable, "-c", code], env=here, capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == "0"
