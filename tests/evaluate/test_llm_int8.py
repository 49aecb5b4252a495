"""The reference of LLM.int8(), against a plain loop."""

import pytest
import torch
import zoo
import zoo_configs

from optq import ModelConfig
from optq.errors import SettingError
from optq.evaluate.llm_int8 import Int8Linear, LLMInt8
from optq.model.blocks import find_blocks

ROWS = {row.name: row for row in zoo.ROWS}


def oracle(x, weight, bias, threshold):
    """The paper's steps, a number at a time, in Python's floats."""
    tokens, columns = x.shape
    out = {j for j in range(columns) if any(abs(x[t, j].item()) > threshold for t in range(tokens))}
    y = torch.zeros(tokens, len(weight), dtype=torch.float64)
    for t in range(tokens):
        kept = [0.0 if j in out else x[t, j].item() for j in range(columns)]
        sx = max(map(abs, kept)) / 127 or 1.0
        for n in range(len(weight)):
            row = weight[n].tolist()
            sw = max(map(abs, row)) / 127 or 1.0
            integer = sum(
                round(kept[j] / sx) * round(row[j] / sw) for j in range(columns) if j not in out
            )
            exact = sum(x[t, j].item() * row[j] for j in out)
            y[t, n] = sx * sw * integer + exact + (0 if bias is None else bias[n].item())
    return y, len(out)


@pytest.mark.parametrize("bias", [True, False])
def test_against_the_plain_loop(bias):
    x = torch.randn(5, 12, dtype=torch.float64)
    x[:, 3] *= 40
    x[2, 7] = -6.5  # one token is enough for a column
    x[1, 8] = 6.0  # not above
    x, weight = x.half().double(), torch.randn(6, 12).half().double()  # what 16 bits hold
    offset = torch.randn(6, dtype=torch.float64) if bias else None
    layer = Int8Linear(weight, offset, LLMInt8())
    wanted, outliers = oracle(x, weight, offset, 6.0)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    assert (layer.outliers, layer.columns) == (outliers, 12) and outliers == 2
    assert layer(x.view(1, 5, 12)).shape == (1, 5, 6)


def test_a_threshold_that_nothing_or_everything_exceeds():
    x, weight = torch.randn(9, 16).half().float(), torch.randn(4, 16).half().float()
    every = Int8Linear(weight, None, LLMInt8(threshold=1e-9))(x)
    torch.testing.assert_close(every, x @ weight.T)
    none = Int8Linear(weight, None, LLMInt8(threshold=1e9))(x)
    error = (none - x @ weight.T).norm() / (x @ weight.T).norm()
    assert 1e-3 < error < 2e-2
    with pytest.raises(SettingError, match="threshold is 0"):
        LLMInt8(threshold=0)


@pytest.mark.parametrize("name", ["llama_bfloat16", "gpt2"])
def test_a_model(tmp_path, name):
    config = ModelConfig(str(zoo.save(ROWS[name], tmp_path / "model")), "cpu")
    model, plain = config.load()[0], config.load()[0]
    blocks = find_blocks(model, r"0\.")
    layers = {layer.name: layer.shape for block in blocks for layer in block.layers}
    size = LLMInt8().apply(model, blocks)
    assert size == sum(rows * columns + 2 * rows for rows, columns in layers.values())
    found = {n for n, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert found == {*layers}
    with torch.no_grad():
        ids = zoo.token_ids()
        far = (model(ids).logits - plain(ids).logits).float().norm() / plain(ids).logits.norm()
    assert 0 < far < 0.05


def test_experts_are_refused():
    model = zoo.Row("mixtral", zoo_configs.mixtral, "model.layers", ()).build()
    with pytest.raises(SettingError, match="are experts, which LLM"):
        LLMInt8().apply(model, find_blocks(model))


def test_a_layer_in_two_places():
    """What is shared stays shared: no place keeps the dense layer."""
    model = ROWS["llama"].build()
    first, second = model.model.layers[:2]
    second.mlp.up_proj = first.mlp.up_proj
    LLMInt8().apply(model, find_blocks(model))
    assert isinstance(first.mlp.up_proj, Int8Linear) and second.mlp.up_proj is first.mlp.up_proj
    kept = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert kept == ["lm_head"]
