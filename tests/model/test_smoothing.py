"""Scales folded into norms: the function stays, whatever the norm does with its weight.

Weights and activations are left unrounded here, so that what is left is the folding alone.
"""

import pytest
import torch
import zoo
import zoo_configs
from greenlet import getcurrent

from optq import ModelConfig, Runner, SmoothQuant, quantize
from optq.errors import ModelError
from optq.model import smoothing
from optq.model.batch import Batch
from optq.model.blocks import Block, Site
from optq.model.layer import Layer
from optq.model.smoothing import MANY, NO_NORM, SHARED, TIED, Norm, Smoother
from optq.solving import stacked

ROWS = {row.name: row for row in zoo.ROWS}
LLAMA = {"q_proj": None, "o_proj": NO_NORM, "gate_proj": None, "down_proj": NO_NORM}


@pytest.fixture
def unrounded(monkeypatch):
    """Every layer gets its smoothed weight as it is, and reads its inputs as they are."""
    put = quantize.Quantization._put
    scales = {}

    def dense(self, site, outcome):
        rows = stacked(site, slice(0, sum(layer.shape[0] for layer in site.layers)))
        put(self, site, outcome)
        for layer, weight in zip(
            site.layers, rows.split([layer.shape[0] for layer in site.layers]), strict=True
        ):
            layer.put(weight)
            scales[layer.name] = site.scales

    monkeypatch.setattr(quantize.Quantization, "_put", dense)
    monkeypatch.setattr(smoothing, "rounded", lambda x: x)
    return scales


def smoothed(folder, skip=None):
    config = ModelConfig(str(folder), "cpu")
    options = {"calib": zoo.token_ids(3, 24), "skip": skip, "format": "compressed-tensors"}
    return Runner(config, SmoothQuant(alpha=0.5), **options).run()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", LLAMA),
        ("llama_bfloat16", LLAMA),
        ("gemma2", LLAMA),  # 1 + weight
        ("gemma3_text", LLAMA),
        ("qwen3", LLAMA),  # norms of heads beside them
        ("opt", {"q_proj": None, "out_proj": NO_NORM, "fc1": None, "fc2": NO_NORM}),
        # Norms behind the layers: what they make is the residual stream.
        ("opt_350m", {"q_proj": NO_NORM, "out_proj": NO_NORM, "fc1": NO_NORM, "fc2": NO_NORM}),
        ("olmo2", {"q_proj": NO_NORM, "gate_proj": NO_NORM, "down_proj": NO_NORM}),
        ("cohere", {"q_proj": None, "o_proj": NO_NORM, "down_proj": NO_NORM}),  # one norm for all
        ("phi", {"q_proj": None, "dense": NO_NORM, "fc2": NO_NORM}),
        ("nemotron", {"q_proj": None, "up_proj": None, "down_proj": NO_NORM}),  # 1 + weight, bias
        ("starcoder2", {"q_proj": None, "c_fc": None, "c_proj": NO_NORM}),
        ("gpt_neox", {"query_key_value": None, "dense": NO_NORM}),
    ],
)
def test_the_function_stays(tmp_path, unrounded, name, expected):
    row = ROWS[name]
    source = zoo.save(row, tmp_path / "model")
    plain = ModelConfig(str(source), "cpu").load()[0]
    result = smoothed(source)
    found = {}
    for site in result.record.sites:
        ends = site.site.rpartition(".")[2]
        if ends in expected:
            assert found.setdefault(ends, site.smoothing.unsmoothed) == site.smoothing.unsmoothed
    assert found == expected
    moved = [scales for scales in unrounded.values() if scales is not None]
    assert bool(moved) == (None in expected.values())
    for scales in moved:
        assert (scales - 1).abs().max() > 0.1
    with torch.no_grad():
        ids = zoo.token_ids(2, 24, seed=5)
        one, other = result.model(ids).logits.double(), plain(ids).logits.double()
    exact = row.dtype == torch.float32
    assert (one - other).norm() <= (1e-5 if exact else 2e-2) * other.norm()


def test_what_a_router_reads_too_is_left_alone(tmp_path, unrounded):
    """The shared experts read the norm's own tensor, as the router does: the rest is dense here."""
    row = zoo.Row("moe", zoo_configs.deepseek_v3, "model.layers", ())
    result = smoothed(zoo.save(row, tmp_path / "model"), skip=r"\.experts\b")
    why = {site.site: site.smoothing.unsmoothed for site in result.record.sites}
    assert {w for n, w in why.items() if n.endswith("shared_experts.gate_proj")} == {SHARED}
    assert {w for n, w in why.items() if "q_a_proj" in n} == {None}


class OneNorm(torch.nn.Module):
    """A block whose norm is called twice, and a gate that is no linear layer."""

    def __init__(self, twice, gated):
        super().__init__()
        self.norm, self.twice = torch.nn.LayerNorm(16), twice
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
        self.gate = torch.nn.Parameter(torch.randn(16, 1)) if gated else None

    def forward(self, x):
        y = self.norm(x)
        out = self.down(self.up(y).relu())
        if self.gate is not None:
            out = out * torch.sigmoid(y @ self.gate)
        return x + (self.norm(out) if self.twice else out)


def block_of(module, index=0, name="b"):
    with torch.no_grad():
        module.norm.weight.add_(torch.randn(16) / 4)
    layers = [Layer(n, module.get_submodule(n), False) for n in ("up", "down")]
    return Block(index, name, module, layers)


def looked(block, *others, model=None, dtype=torch.float32):
    """The site of ``up``, after a scout went through the block."""
    module, site = block.module, Site(block, block.layers[:1])
    smoother = Smoother(SmoothQuant(), {"b.norm.weight": "", "b.norm.bias": ""})
    x = torch.randn(1, 5, 16, dtype=dtype)
    with torch.no_grad(), smoother.hooks([block, *others], model):

        def read(module, args):
            if isinstance(getcurrent(), Batch):
                smoother.source(batch, site, args[0])

        module.up.register_forward_pre_hook(read)
        batch = Batch(lambda ids: module(x), torch.zeros(1, 5).long(), 0, "scout")
        batch.switch()
        before = {name: each.clone() for name, each in module.named_parameters()}
        smoother.look(block, [site])
        assert all(torch.equal(each, before[n]) for n, each in module.named_parameters())
    return site


@pytest.mark.parametrize(
    ("twice", "gated", "why"), [(False, False, None), (True, False, MANY), (False, True, SHARED)]
)
def test_reasons(twice, gated, why):
    assert looked(block_of(OneNorm(twice, gated))).unsmoothed == why


def test_what_the_scout_missed_has_a_reason():
    block = block_of(OneNorm(False, False))
    site = Site(block, block.layers[1:])
    smoother = Smoother(SmoothQuant(), {"b.norm.weight": "", "b.norm.bias": ""})
    smoother.look(block, [site])
    assert site.unsmoothed == NO_NORM


class Halves(OneNorm):
    """A block that knows one dtype only, and one that hands on what its norm made."""

    def forward(self, x):
        if self.twice and x.dtype != torch.bfloat16:
            raise RuntimeError("expected bfloat16, and got another")
        y = self.norm(x)
        return x + self.down(self.up(y).relu()), {"normed": y}


def test_all_that_a_block_returns_is_compared():
    assert looked(block_of(Halves(False, False))).unsmoothed == SHARED


def test_a_block_that_cannot_run_in_float32():
    block = block_of(Halves(True, False).bfloat16())
    with pytest.raises(
        ModelError, match=r"b cannot be tried in float32: expected.*\n.*--alpha off"
    ):
        looked(block, dtype=torch.bfloat16)
    assert {each.dtype for each in block.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("what", ["layer", "weight of a layer", "norm", "weight of a norm", None])
@pytest.mark.parametrize("outside", [False, True])
def test_what_others_have_too_is_left_alone(what, outside):
    """Scales that are folded into one block's norm must not reach others by a shared weight."""
    one, other = OneNorm(False, False), OneNorm(False, False)
    if what == "layer":
        other.up = one.up
    elif what == "weight of a layer":
        other.up.weight = one.up.weight
    elif what == "norm":
        other.norm = one.norm
    elif what == "weight of a norm":
        other.norm.weight = one.norm.weight
    blocks = [block_of(one), block_of(other, 1, "c")]
    model = torch.nn.Sequential(one, other)
    site = looked(*blocks[: 1 if outside else 2], model=model)
    assert site.unsmoothed == (None if what is None else TIED)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_folded_weights_stand_for_the_scales_that_are_given(offset):
    """In bfloat16 too: what rounding moves is in the scales, so the product stays."""
    module = torch.nn.LayerNorm(64).to(torch.bfloat16)
    with torch.no_grad():
        module.weight.copy_(torch.randn(64) / 4 + 1 - offset)
        module.bias.normal_()
        module.weight[3] = -offset  # multiplies by nothing
    asked = torch.logspace(-2, 2, 64)
    values, exact = Norm("n", module, offset).folded(asked)
    old, new = module.weight.double() + offset, values["weight"].double() + offset
    torch.testing.assert_close(new * exact, old, rtol=1e-12, atol=0)
    assert exact[3] == 1 and values["weight"][3] == module.weight[3]
    kept = exact == 1
    ratio = exact[~kept] / asked[~kept]
    # 1 + weight keeps few digits of a small factor: such a channel stays as it was.
    assert ratio.min() > 0.5 and ratio.max() < 2 and kept.sum() <= (20 if offset else 1)
    torch.testing.assert_close(
        values["bias"].double() * exact, module.bias.double(), rtol=2**-8, atol=0
    )
