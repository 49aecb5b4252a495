"""What runs on a GPU runs here on a pretended one: see :mod:`pretend` for what that can show.

Every promise of the design, for one dense model and one with experts; codes are not compared with
the CPU's, where products are rounded otherwise.
"""

import shutil

import decoder
import numpy as np
import pytest
import torch
import zoo
import zoo_configs as configs
from pretend import Pretend, pretended
from safetensors.torch import load_file, save_file

from optq import GPTQ, OBQ, RTN, ModelConfig, Runner, load
from optq.errors import NumericsError, OptqError, OutputError
from optq.model.linear import QuantizedExperts, QuantizedLinear, make_dense
from optq.record import TIMES

ROWS = {
    "llama": next(row for row in zoo.ROWS if row.name == "llama"),
    "qwen3_moe": zoo.Row("qwen3_moe", configs.qwen3_moe, "", ()),
}
CALIB = zoo.token_ids(4, 24)
OPTIONS = {
    "default": (GPTQ(3, 32), True),
    "plain, act-order": (GPTQ.plain(4, 32, sym=False, actorder=True), False),
}
both = pytest.mark.parametrize("name", ROWS)


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


def quantize(folder, quantizer=OPTIONS["default"][0], qep=True, **options):
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


# Whole runs: the promises


@both
@pytest.mark.parametrize("option", OPTIONS)
def test_written_measured_and_never_worse_than_rounding(gpu, folder_of, tmp_path, name, option):
    result = quantize(folder_of(name), *OPTIONS[option])
    result.save(tmp_path / "out")
    for layer in result.layers:
        assert 0 <= layer.error <= layer.rtn_error * (1 + 1e-6), layer.name
    read, ids = load(tmp_path / "out", "cpu"), zoo.token_ids()
    make_dense(read)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, result.model(ids).logits)
    packed = {layer.name for layer in result.layers}
    assert packed == set(decoder.decode(tmp_path / "out").keys() & packed)
    assert len(packed) == {"llama": 21, "qwen3_moe": 32}[name]


@both
def test_the_same_bytes_again_and_after_a_crash(gpu, folder_of, tmp_path, name):
    quantize(folder_of(name), output=tmp_path / "one")

    def cut(step):
        if step.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder_of(name), output=tmp_path / "two", progress=cut)
    assert (tmp_path / ".two.partial").is_dir() and not (tmp_path / "two").exists()
    blocks = []
    quantize(
        folder_of(name), output=tmp_path / "two", progress=lambda step: blocks.append(step.block)
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and 0 not in blocks


@both
def test_nothing_is_lost_and_nothing_overwritten(gpu, folder_of, tmp_path, name):
    source = shutil.copytree(folder_of(name), tmp_path / "source")
    (source / "NOTES.md").write_text("ours")
    out = tmp_path / "out"
    quantize(source, RTN(4, 32), False, output=out)
    assert {path.name for path in source.iterdir()} <= {path.name for path in out.iterdir()}
    before = contents(out)
    with pytest.raises(OutputError, match="exists"):
        quantize(source, RTN(4, 32), False, output=out)
    assert contents(out) == before


@both
def test_nan_names_block_layer_and_sample(gpu, folder_of, tmp_path, name):
    source = shutil.copytree(folder_of(name), tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["model.layers.1.input_layernorm.weight"][0] = float("nan")
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError) as caught:
        quantize(source, output=tmp_path / "out")
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
    row = zoo.Row("mixtral", configs.mixtral, "", ())
    model = zoo.without_tokens(row.build())
    model.save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    result = quantize(tmp_path / "model", output=tmp_path / "out")
    alone = [layer for layer in result.layers if layer.tokens == 0]
    assert alone and all(layer.borrowed > 0 for layer in alone)
    assert all(np.isfinite(each).all() for each in decoder.decode(tmp_path / "out").values())


@pytest.mark.parametrize("memory", [1 << 40, 1])
def test_what_batches_hold_moves_between_device_memory_and_files(gpu, folder_of, tmp_path, memory):
    options = {"activation_memory": memory, "output": tmp_path / str(memory)}
    whole = quantize(folder_of("qwen3_moe"), output=tmp_path / "whole")
    part = quantize(folder_of("qwen3_moe"), **options)
    assert [layer.error for layer in part.layers] == [layer.error for layer in whole.layers]


# Packed models


@both
def test_packed_layers_multiply_there(gpu, folder_of, tmp_path, name):
    quantize(folder_of(name), GPTQ(4, 32), output=tmp_path / "out")
    model, ids = load(tmp_path / "out", "cuda:0"), zoo.token_ids(1, 8)
    kinds = {type(module) for module in model.modules()}
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.product.name for layer in layers} <= {"triton", "reference"}
    assert name == "llama" or any(issubclass(kind, QuantizedExperts) for kind in kinds)
    dense = load(tmp_path / "out", "cpu")
    make_dense(dense)
    with torch.no_grad():
        found, exact = model(ids.to(gpu)).logits, dense(ids).logits
    assert found.device == gpu
    assert (found.cpu() - exact).norm() < 1e-4 * exact.norm()
