"""Gradients of scales, and divergences, against plain computations in float64."""

from copy import deepcopy

import pytest
import torch
import zoo
import zoo_configs as configs
from torch.func import functional_call

from optq.core.grid import Storage
from optq.core.weight import QuantizedWeight, group_index
from optq.model import student
from optq.model.blocks import find_blocks
from optq.model.student import Divergence, Student

EXACT = Storage(())
ROWS = {row.name: row for row in zoo.ROWS}
TOKENS = zoo.token_ids(3, 24)


def build(name):
    row = ROWS.get(name) or zoo.Row(name, getattr(configs, name), "", ())
    model = row.build().double()
    for module in model.modules():
        if hasattr(module, "config"):  # the faster implementations know no float64
            module.config._experts_implementation = "eager"
    return model


def rounded(layer, groupsize=16, actorder=False):
    """Some codes and scales for a layer, in 3 bits with free zero points."""
    W = layer.weight
    rows, cols = W.shape
    g_idx = group_index(cols, groupsize, W.device)
    if actorder:
        g_idx = g_idx[torch.randperm(cols)]
    groups = int(g_idx.max()) + 1
    scales = torch.rand(rows, groups, dtype=torch.float64) * 0.2 + 0.1
    zeros = torch.randint(2, 6, (rows, groups), dtype=torch.uint8)
    units = W / scales[:, g_idx.long()] + zeros[:, g_idx.long()]
    return QuantizedWeight(3, units.round().clamp(0, 7).to(torch.uint8), scales, zeros, g_idx)


def of(name, actorder=False):
    """A student in its first state, the model it learns from, and what that one's head reads."""
    model = build(name)
    full, blocks = deepcopy(model), find_blocks(model)
    layers = [layer for block in blocks for layer in block.layers]
    made = Student(model, blocks, {x: rounded(x, actorder=actorder) for x in layers})
    wanted = made.hidden(TOKENS)
    made.put(EXACT)
    return made, full, wanted


def plain(full, quantized):
    p, q = full.log_softmax(-1), quantized.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_a_divergence_is_that_of_the_predictions(monkeypatch):
    made, full, wanted = of("llama")
    with torch.no_grad():
        expected = plain(full(TOKENS).logits, made.model(TOKENS).logits).mean().item()
    assert expected > 0.01
    assert made.divergence(TOKENS, wanted) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(student, "TOKENS", 24)  # one sample at a time
    monkeypatch.setattr(student, "CHUNK", 7)
    assert made.divergence(TOKENS, wanted) == pytest.approx(expected, rel=1e-12)


def test_what_stands_behind_the_head_is_done_to_both():
    """Logits that are capped, or scaled: they would be other predictions without."""
    made, full, wanted = of("gemma2")
    with torch.no_grad():
        expected = plain(full(TOKENS).logits, made.model(TOKENS).logits).mean().item()
    assert made.divergence(TOKENS, wanted) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_a_divergence(dtype):
    full, quantized = (torch.randn(600, 50, dtype=torch.float64) * 3 for _ in range(2))
    full, quantized = full.to(dtype), quantized.to(dtype).requires_grad_()
    exact = quantized.detach().double().requires_grad_()
    (expected := plain(full.double(), exact).sum()).backward()
    (found := Divergence.apply(quantized, full)).backward()
    assert found.item() == pytest.approx(
        expected.item(), rel=1e-12 if dtype.itemsize == 8 else 1e-5
    )
    bound = 4 * torch.finfo(dtype).eps
    assert torch.allclose(quantized.grad.double(), exact.grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("actorder", [False, True])
def test_the_gradient_is_that_through_the_dequantization(actorder):
    made, full, wanted = of("llama", actorder)
    with torch.no_grad():
        made.moved.normal_(0, 0.1)
    made.put(EXACT)
    moved = {x: x.moved.clone().requires_grad_() for x in made.layers}
    weights = {}
    for scales, t in moved.items():
        w, group = scales.weight, scales.weight.g_idx.long()
        s = w.scales * t.exp()
        weights[f"{scales.layer.name}.weight"] = s[:, group] * (
            w.codes.double() - w.zeros[:, group]
        )
    quantized = functional_call(made.model, weights, (TOKENS,)).logits
    with torch.no_grad():
        aim = full(TOKENS).logits
    (total := plain(aim, quantized).sum()).backward()
    with made.learning():
        found = made.divergence(TOKENS, wanted, learn=True)
    assert found * TOKENS.numel() == pytest.approx(total.item(), rel=1e-10)
    for scales, t in moved.items():
        assert torch.allclose(scales.gradient, t.grad, rtol=1e-8, atol=1e-12), scales.layer.name
    assert (made.slope != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    "name", ["gpt2", "qwen3_moe", "mixtral", "gpt_oss", "llama4", "qwen3_next", "deepseek_v3"]
)
def test_the_gradient_is_the_slope(name):
    """Against differences: of experts in every layout, too."""
    made, _, wanted = of(name)
    with made.learning():
        made.divergence(TOKENS, wanted, learn=True)
    slope = made.slope.clone()
    direction, values = torch.randn_like(slope), []
    step = 1e-4  # more than the last bits of routers in float32, less than another expert
    for sign in (1, -1):
        made.moved.copy_(sign * step * direction)
        made.put(EXACT)
        values.append(made.divergence(TOKENS, wanted))
    expected = (values[0] - values[1]) / (2 * step) * TOKENS.numel()
    assert (slope @ direction).item() == pytest.approx(expected, rel=2e-2)
    assert len({scales.layer for scales in made.layers if scales.gradient.any()}) > 3


def test_nothing_stays_of_it():
    made, _, wanted = of("qwen3_moe")
    before = {name: p.requires_grad for name, p in made.model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    implementation = made.model.config._experts_implementation
    with made.learning():
        made.divergence(TOKENS, wanted, learn=True)
    assert {name: p.requires_grad for name, p in made.model.named_parameters()} == before
    assert all(p.grad is None for p in made.model.parameters())
    assert all("forward" not in module.__dict__ for module in made.model.modules())
    assert made.model.config._experts_implementation == implementation
    assert not any(bank.slices for block in made.blocks for bank in block.banks)
    assert all(torch.equal(state[n], t) for n, t in made.model.state_dict().items())
