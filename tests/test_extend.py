"""A new solver, kernel or format is one class and one row: here each is added, and used throughout.

(A new grid is added in ``core/test_solvers.py``, where the table of solvers takes it.)
"""

import json
import sys
from dataclasses import dataclass

import pytest
import torch
import zoo
from torch.nn.functional import linear

from optq import GPTQ, ModelConfig, Runner, cli, load
from optq.core.grid import BITS, Storage
from optq.core.methods import METHODS
from optq.core.rounding import round_groups, working_copy
from optq.core.solver import Solver
from optq.core.weight import LayerScheme, QuantizedWeight, group_index
from optq.errors import SettingError
from optq.formats import FORMATS
from optq.formats.scheme import Detected, Format
from optq.kernels import table
from optq.kernels.product import Product
from optq.kernels.table import Kernel
from optq.model.linear import QuantizedLinear, make_dense

CALIB = zoo.token_ids(4, 24)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    row = next(row for row in zoo.ROWS if row.name == "llama")
    return zoo.save(row, tmp_path_factory.mktemp("zoo") / "llama")


@pytest.fixture
def optq(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["optq", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


# ------------------------------------------------------------------------------------ a solver


@dataclass(frozen=True)
class Shrunk(Solver):
    """Rounds a fraction of each weight."""

    wbits: int
    groupsize: int = -1
    sym: bool = True
    factor: float = 0.5
    mse = False
    percdamp = 0.0

    def _solve(self, problem, weight, aim, storage):
        W = working_copy(weight if aim is None else aim) * self.factor
        group = group_index(len(W), self.grid.width(len(W)), W.device)
        rounded = round_groups(W, group, self.grid, storage, problem.importance)
        error = torch.zeros(W.shape[1])
        return self._solution(rounded.codes, rounded.scale, rounded.zero, group, error, error)


def test_a_solver_is_a_class_and_a_row(llama, tmp_path, monkeypatch, optq):
    monkeypatch.setitem(METHODS, "shrunk", Shrunk)
    (tmp_path / "text.txt").write_text("the other end of the theorem is not as near. " * 60)
    out, text = tmp_path / "out", tmp_path / "text.txt"
    words = ("--calib", text, "--nsamples", "4", "--seqlen", "16", "--device", "cpu", "--json")
    said = json.loads(
        optq("quantize", llama, out, "--method", "shrunk", "--groupsize", "32", *words)
    )
    assert said["method"] == "shrunk" and said["factor"] == 0.5
    assert json.loads((out / "optq.json").read_text())["method"] == "shrunk"
    source = next(row for row in zoo.ROWS if row.name == "llama").build()
    for name, layer in load(out, "cpu").named_modules():
        if isinstance(layer, QuantizedLinear):
            half = source.get_submodule(name).weight / 2
            assert (layer.weight - half).norm() < 0.15 * half.norm()


# ------------------------------------------------------------------------------------ a kernel


class Counted(Product):
    """Keeps the dense weight, and counts its products."""

    calls = 0

    def __init__(self, weight, dtype):
        super().__init__(weight.rows, weight.cols, dtype)
        self.keep("kept", weight.weight.to(dtype))

    def dense(self):
        return self.kept

    def forward(self, x):
        Counted.calls += 1
        return linear(x, self.kept)


def test_a_kernel_is_a_class_and_a_row(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = ModelConfig(str(llama), "cpu")
    Runner(config, GPTQ.plain(4, 32), calib=CALIB, output=out).run()
    dense = load(out, "cpu")
    make_dense(dense)
    with torch.no_grad():
        expected = dense(CALIB).logits
    row = Kernel("counted", ("cpu",), BITS, {torch.float32: 1e-6}, lambda weight: True, Counted)
    monkeypatch.setattr(table, "KERNELS", (row, *table.KERNELS))
    model = load(out, "cpu")
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.product.name for layer in layers} == {"counted"}
    with torch.no_grad():
        found = model(CALIB).logits
    assert Counted.calls == len(layers)
    assert (found - expected).norm() < 1e-5 * expected.norm()


# ------------------------------------------------------------------------------------ a format


@dataclass(frozen=True)
class Bytes(Format):
    """One byte to a code, whatever its width."""

    name: str = "bytes"
    suffixes: tuple[str, ...] = ("codes", "scales", "zeros", "g_idx")
    settings_file: str | None = "bytes.json"

    def storage(self, dtype):
        return Storage(())

    def check(self, name, rows, columns, layer, conv1d=False):
        if conv1d:
            raise SettingError(f"{name} is a Conv1D", "write --format gptq")

    def encode(self, layer, dtype, sym):
        return {suffix: getattr(layer, suffix).clone() for suffix in self.suffixes}

    def decode(self, name, tensors, layer):
        return QuantizedWeight(layer.wbits, **tensors)

    def config(self, layers, dense, percdamp, outside=()):
        (scheme,) = set(layers.values())
        return {"quant_method": self.name, "bits": scheme.wbits, "columns": scheme.groupsize}

    def detect(self, settings):
        if settings.get("quant_method") != self.name:
            return None
        scheme = LayerScheme(settings["bits"], settings["columns"], sym=True)
        return Detected(self, lambda name: scheme)


def test_a_format_is_a_class_and_a_row(llama, tmp_path, monkeypatch, optq):
    monkeypatch.setitem(FORMATS, "bytes", Bytes())
    config = ModelConfig(str(llama), "cpu")
    solver = GPTQ(3, 32)
    kept = Runner(config, solver, calib=CALIB, format="bytes").run()
    Runner(config, solver, calib=CALIB, format="bytes", output=tmp_path / "out").run()
    assert (tmp_path / "out" / "bytes.json").is_file()
    assert json.loads(optq("inspect", tmp_path / "out", "--json"))["format"] == "bytes"
    weights = dict(kept.model.named_parameters())
    for name, layer in load(tmp_path / "out", "cpu").named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(layer.weight, weights[f"{name}.weight"])
    Runner(config, solver, calib=CALIB, format="gptq", output=tmp_path / "gptq").run()
    optq("export", tmp_path / "gptq", tmp_path / "again", "--format", "bytes")
    optq("export", tmp_path / "again", tmp_path / "back", "--format", "gptq")
    (one,), (other,) = (sorted((tmp_path / n).glob("*.safetensors")) for n in ("gptq", "back"))
    assert one.read_bytes() == other.read_bytes()
