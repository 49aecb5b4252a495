"""What runs on a GPU runs here on a pretended one: see :mod:`pretend` for what that can show.

Every promise of the design, for one dense model and one with experts; codes are not compared with
the CPU's, where products are rounded otherwise.
"""

import shutil
from contextlib import nullcontext
from importlib.util import find_spec

import decoder
import numpy as np
import pytest
import torch
import zoo
import zoo_configs as configs
from pretend import Pretend, interpreted, pretended
from safetensors.torch import load_file, save_file

from optq import GPTQ, OBQ, RTN, ModelConfig, Runner, load
from optq.core.sweep import _on_gpu
from optq.errors import NumericsError, OptqError, OutputError
from optq.model.linear import QuantizedExperts, QuantizedLinear, make_dense
from optq.record import TIMES

ROWS = {
    "llama": next(row for row in zoo.ROWS if row.name == "llama"),
    "qwen3_moe": zoo.Row("qwen3_moe", configs.qwen3_moe, "", ()),
}
CALIB = zoo.token_ids(4, 24)
both = pytest.mark.parametrize("name", ROWS)
interpreter = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="Triton does not interpret"
)


@pytest.fixture
def gpu():
    with pretended() as device:
        yield device


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = zoo.save(ROWS[name], tmp_path_factory.mktemp("zoo") / name)
        return made[name]

    return folder


def quantize(folder, quantizer=None, qep=True, **options):
    quantizer = quantizer or GPTQ(3, 32)
    options = {"calib": CALIB, "qep": qep} | options
    return Runner(ModelConfig(str(folder), "cuda:0"), quantizer, **options).run()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != TIMES}


# The device itself


def test_tensors_of_two_devices_do_not_meet(gpu):
    here, there = torch.randn(4, 4), torch.randn(4, 4).to(gpu)
    assert there.device == gpu and isinstance(there, Pretend) and type(there.cpu()) is torch.Tensor
    for meet in (
        lambda: here @ there,
        lambda: there.add_(here),
        lambda: torch.where(there > 0, there, here),
        lambda: torch.nn.functional.linear(there, here),
        lambda: torch.cat([there, here]),
        lambda: there.__setitem__(torch.tensor([1]), here[:1]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            meet()
    there[torch.tensor([1, 2])] = 0.0  # as an index, as one number, and copied they may
    there[0].copy_(here[0])
    assert torch.equal(
        (there * torch.tensor(2.0)).cpu()[:3], 2 * torch.stack([here[0], *[here[0] * 0] * 2])
    )


def test_what_is_written_into_a_part_is_written_into_the_whole(gpu):
    whole = torch.zeros(4, 6, device=gpu)
    before = whole._version
    whole[1:3, ::2].add_(1)
    whole[..., -1][0] = 5.0
    expected = torch.zeros(4, 6)
    expected[1:3, ::2] += 1
    expected[0, -1] = 5
    assert torch.equal(whole.cpu(), expected) and whole._version > before


def test_a_module_and_what_it_computes_are_there(gpu):
    layer = torch.nn.Linear(4, 3).to(gpu)
    with torch.no_grad():
        assert layer(torch.ones(2, 4, device=gpu)).device == layer.weight.device == gpu
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(2, 4))


# The solvers


@pytest.mark.parametrize(
    "solver",
    [GPTQ(4, 32), GPTQ.plain(3, -1), GPTQ(2, 16, sym=False, actorder=True), RTN(3, 16), OBQ(4, 16)],
    ids=str,
)
def test_no_row_is_worse_than_rounding(gpu, solver):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(32, 20, generator=generator)  # fewer tokens than columns: no factor as it is
    X[3] = 0
    H, W = X @ X.T / 20, torch.randn(24, 32, generator=generator)
    W[5] = W[5].abs()  # of one sign
    with torch.no_grad():
        problem = solver.problem(H.to(gpu))
        solution = solver.solve(problem, W.to(gpu))
    codes = solution.weight
    assert codes.device == gpu and codes.isfinite().all()
    Q, H = codes.cpu().double(), H.double()
    error = ((W - Q) @ H * (W - Q)).sum(1)
    assert torch.allclose(solution.error.cpu().double(), error, rtol=1e-3, atol=1e-5)
    assert (solution.error.cpu() <= solution.rtn_error.cpu() * (1 + 1e-3) + 1e-6).all()
    assert problem.dead.cpu().tolist() == [column == 3 for column in range(32)]


# Triton's kernels


@interpreter
@pytest.mark.parametrize("options", [{}, {"sym": False, "actorder": True}], ids=str)
def test_the_column_loop_is_a_kernel_there(monkeypatch, options):
    """Of two experts, each with a Hessian of its own."""
    monkeypatch.setattr("optq.core.gpu._builds", lambda: True)
    solver = GPTQ.plain(4, 16, **options)
    W, X = torch.randn(2, 20, 32), torch.randn(2, 64, 32)
    solved = []
    for device in (interpreted, nullcontext):
        with device() as there:
            put = [each.to(there) for each in (*W, *X)]
            assert _on_gpu(put[0]) == (device is interpreted)
            sites = [solver.problem(x.T @ x / 64) for x in put[2:]]
            solved.append(solver.solve_together(sites, put[:2], [None, None]))
    for found, plain in zip(*solved, strict=True):
        assert isinstance(found.codes, Pretend)
        assert (found.codes.cpu() == plain.codes).double().mean() > 0.98
        torch.testing.assert_close(found.error.cpu().sum(), plain.error.sum(), rtol=1e-4, atol=0)


@interpreter
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_packed_products_are_kernels_there(monkeypatch, tokens):
    monkeypatch.setattr("optq.core.gpu._builds", lambda: True)
    solution = RTN(4, 16).solve(RTN(4, 16).problem(torch.eye(32)), torch.randn(20, 32))
    layer = QuantizedLinear(32, 20, bias=False)
    x = torch.randn(tokens, 32, dtype=torch.bfloat16)
    with interpreted() as there, torch.no_grad():
        layer.fill(solution.to(there), torch.bfloat16)
        found = layer(x.to(there))
        assert layer.product.name == "triton" and found.device == there
    exact = x.double() @ solution.weight.double().T
    assert (found.cpu() - exact).norm() < 8e-3 * exact.norm()


# Whole runs: the promises


@pytest.fixture(scope="module")
def made(folder_of, tmp_path_factory):
    """The default's result and its checkpoint, made once for each model."""
    known = {}

    def run(name):
        if name not in known:
            out = tmp_path_factory.mktemp("made") / name
            with pretended():
                known[name] = quantize(folder_of(name), output=out), out
        return known[name]

    return run


@both
def test_all_is_written_and_never_worse_than_rounding(made, name):
    result, out = made(name)
    assert len(result.layers) == {"llama": 21, "qwen3_moe": 32}[name] and result.dense == []
    for layer in result.layers:
        assert 0 <= layer.error <= layer.rtn_error * (1 + 1e-6), layer.name
    assert sum(layer.error for layer in result.layers) < 0.9 * sum(
        layer.rtn_error for layer in result.layers
    )
    assert {layer.name for layer in result.layers} <= decoder.decode(out).keys()


@both
def test_what_is_written_is_what_was_measured(gpu, folder_of, tmp_path, name):
    result = quantize(folder_of(name), GPTQ.plain(4, 32, sym=False, actorder=True), False)
    result.save(tmp_path / "out")
    read, ids = load(tmp_path / "out", "cpu"), zoo.token_ids()
    make_dense(read)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, result.model(ids).logits)


@both
def test_a_crash_costs_one_block_and_no_byte(gpu, folder_of, made, tmp_path, name):
    def cut(step):
        if step.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder_of(name), output=tmp_path / "out", progress=cut)
    assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
    blocks = set()
    quantize(folder_of(name), output=tmp_path / "out", progress=lambda at: blocks.add(at.block))
    assert contents(made(name)[1]) == contents(tmp_path / "out") and 0 not in blocks


@both
def test_nothing_is_lost_and_nothing_overwritten(gpu, folder_of, made, name):
    _, out = made(name)
    before = contents(out)
    assert {path.name for path in folder_of(name).iterdir()} <= before.keys()
    with pytest.raises(OutputError, match="exists"):
        quantize(folder_of(name), RTN(4, 32), False, output=out)
    assert contents(out) == before


@both
def test_nan_names_block_layer_and_sample(gpu, folder_of, tmp_path, name):
    source = shutil.copytree(folder_of(name), tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["model.layers.1.input_layernorm.weight"][0] = float("nan")
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError) as caught:
        quantize(source, GPTQ.plain(4, 32), False, output=tmp_path / "out")
    assert "self_attn.q_proj (block 1)" in caught.value.cause and "sample 0" in caught.value.cause
    assert not (tmp_path / "out").exists()


@both
def test_bad_input_is_refused(gpu, folder_of, tmp_path, name):
    (tmp_path / "short.txt").write_text("two words")
    for options in ({"calib": tmp_path / "short.txt"}, {"quantizer": GPTQ(4, 48)}):
        with pytest.raises(OptqError):
            quantize(folder_of(name), output=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_an_expert_that_no_token_reached_is_named(gpu, tmp_path):
    model = zoo.without_tokens(zoo.Row("mixtral", configs.mixtral, "", ()).build())
    model.save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    result = quantize(tmp_path / "model", GPTQ.plain(4, 32), output=tmp_path / "out")
    alone = [layer for layer in result.layers if layer.tokens == 0]
    assert alone and all(layer.borrowed > 0 for layer in alone)
    assert all(np.isfinite(each).all() for each in decoder.decode(tmp_path / "out").values())


# Packed models


@both
def test_packed_layers_multiply_there(gpu, made, name):
    _, out = made(name)
    model, dense, ids = load(out, "cuda:0"), load(out, "cpu"), zoo.token_ids(1, 8)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.product.name for layer in layers} <= {"triton", "reference"}
    kinds = {type(module) for module in model.modules()}
    assert name == "llama" or any(issubclass(kind, QuantizedExperts) for kind in kinds)
    make_dense(dense)
    with torch.no_grad():
        found, exact = model(ids.to(gpu)).logits, dense(ids).logits
    assert found.device == gpu
    assert (found.cpu() - exact).norm() < 1e-4 * exact.norm()
