"""Products are exact inside core, whatever the caller has set, and what he has set comes back."""

import threading

import numpy as np
import oracles
import pytest
import torch
from core.checks import array
from core.problems import problem

from optq.core import precision
from optq.core.error import undamped_error
from optq.core.gptq import GPTQ
from optq.core.hessian import Hessian, add_drift
from optq.core.obq import OBQ
from optq.core.precision import exact_products
from optq.core.problem import Problem, factor
from optq.core.qep import QEP
from optq.core.rtn import RTN

BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
SETTINGS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32 on a GPU": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "tf32 everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "bf16 on a CPU": lambda: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    yield SETTINGS[request.param]
    torch.backends.fp32_precision = torch.backends.mkldnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"


def in_force():
    return [backend.fp32_precision for backend in BACKENDS]


def test_what_the_caller_has_set_is_put_aside_and_comes_back(setting):
    setting()
    before = in_force()
    with exact_products():
        assert in_force() == ["ieee", "ieee"]
        with exact_products("bf16"):
            assert in_force() == ["ieee", "bf16"]
        assert in_force() == ["ieee", "ieee"]
    assert in_force() == before
    with pytest.raises(ZeroDivisionError), exact_products():
        raise ZeroDivisionError
    assert in_force() == before


def test_a_setting_that_follows_its_parent_goes_on_doing_so():
    try:
        torch.backends.fp32_precision = "tf32"
        with exact_products():
            pass
        torch.backends.fp32_precision = "ieee"
        assert in_force() == ["ieee", "ieee"]
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("solver", [RTN(3, 32), OBQ(3, 32), GPTQ.plain(3, 32), GPTQ(3, 32)])
def test_a_solver_gives_the_same_bits_under_any_setting(setting, solver):
    W, H = problem(8, 64, seed=1).tensors(torch.float32)
    drift = 0.1 * H.roll(1, 0)
    expected = whole(solver, W, H, drift)
    setting()
    for one, other in zip(whole(solver, W, H, drift), expected, strict=True):
        assert torch.equal(one, other)


def whole(solver, W, H, drift):
    p = solver.problem(H)
    aim = QEP().correct(p, W, drift)
    solution = solver.solve(p, W, aim)
    return aim, solution.codes, solution.scales, solution.error


def test_threads_take_turns(setting):
    """The settings are the process': a thread that leaves must not take them from another."""
    setting()
    before, seen = in_force(), []
    inside, leave = threading.Event(), threading.Event()

    def first():
        with exact_products("bf16"):
            inside.set()
            leave.wait(10)

    def second():
        inside.wait(10)
        with exact_products():
            seen.append(in_force())

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    assert seen == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert seen == [["ieee", "ieee"]] and in_force() == before


def test_every_product_of_core_is_exact(setting):
    """Called by themselves, as a notebook does; against float64."""
    setting()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 64, generator=generator)
    y = x + 0.01 * torch.randn(600, 64, generator=generator)
    H, drift = Hessian(64), torch.zeros(64, 64)
    H.add(x)
    add_drift(drift, x, y)
    close = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(array(H.matrix()), oracles.hessian(x.double().numpy()), **close)
    exact = (y.double() - x.double()).T @ x.double()
    np.testing.assert_allclose(array(drift), exact.numpy(), rtol=1e-4, atol=1e-3)
    U = factor(H.matrix(), 0.01).U.double()
    damped = H.matrix().double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    np.testing.assert_allclose(U @ U.T, damped, **close)
    miss = torch.randn(64, 5, generator=generator)
    error = oracles.row_errors(array(miss.T), np.zeros((5, 64)), array(H.matrix()))
    np.testing.assert_allclose(undamped_error(miss, H.matrix()), error, rtol=1e-5)
    corrected = QEP().correct(Problem(H.matrix(), 0.01), miss.T.contiguous(), drift / 600)
    shift = miss.T.double() @ (drift / 600).double() @ torch.linalg.inv(damped)
    np.testing.assert_allclose(corrected - miss.T, 0.5 * shift, rtol=1e-3, atol=1e-5)


def test_torch_before_2_9_has_one_setting_for_all(monkeypatch):
    """Its older interface, which newer ones still have."""
    monkeypatch.setattr(precision, "hasattr", lambda *_: False, raising=False)
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
            with exact_products("bf16"):
                assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend in BACKENDS:
            backend.fp32_precision = "none"
