"""Layers that do not fit are named at once, and what the remedy says works."""

import re
from dataclasses import replace

import pytest
import zoo
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from optq.core.weight import LayerScheme
from optq.errors import SettingError
from optq.formats import FORMATS
from optq.formats.fit import check_layers
from optq.model.blocks import find_blocks

FOUR_BITS = LayerScheme(4, 128, True)


def llama(hidden, intermediate):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=intermediate,
            num_hidden_layers=2, num_attention_heads=2,
        )
    )  # fmt: skip


def refusal(model, scheme, form="gptq", skip=None):
    with pytest.raises(SettingError) as refused:
        check_layers(FORMATS[form], find_blocks(model, skip), scheme)
    return refused.value.cause, refused.value.remedy


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_sizes_that_fit_every_layer(form):
    """192 and 320 columns: 64 divides both, and 128 neither."""
    model = llama(192, 320)
    cause, remedy = refusal(model, FOUR_BITS, form)
    assert cause.startswith("groupsize 128 does not divide the 192 columns of model.layers.0.")
    assert "misfits: 14 of 14 layers, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj" in cause
    assert remedy == "choose --groupsize 64 or 32 or 16 or -1"
    for size in map(int, re.findall(r"-?\d+", remedy)):
        check_layers(FORMATS[form], find_blocks(model), replace(FOUR_BITS, groupsize=size))


def test_no_size_fits_every_layer():
    """72 columns of down_proj: 8 divides them, and nobody reads groups of 8."""
    model = llama(64, 72)
    scheme = replace(FOUR_BITS, groupsize=32)
    cause, remedy = refusal(model, scheme)
    assert "the 72 columns of model.layers.0.mlp.down_proj (misfits: 2 of 14 layers" in cause
    assert "choose --groupsize -1, or " in remedy
    skip = re.search(r"--skip '(.*)'", remedy)[1]
    assert skip == r"\.(down_proj)$"
    check_layers(FORMATS["gptq"], find_blocks(model, skip), scheme)


def test_words_that_are_not_full():
    """72 rows at 3 bits; together with a pattern that is given already."""
    model = llama(64, 72)
    scheme = LayerScheme(3, -1, True)
    cause, remedy = refusal(model, scheme, skip="v_proj")
    assert "cannot be packed at 3 bits: 72 rows" in cause
    assert "misfits: 6 of 12 layers, gate_proj, up_proj, down_proj" in cause
    assert remedy.startswith("choose --format compressed-tensors, or choose --wbits 4, or choose")
    skip = re.search(r"--skip '(.*)'", remedy)[1]
    blocks = find_blocks(model, skip)
    check_layers(FORMATS["gptq"], blocks, scheme)
    left = {layer.name.rpartition(".")[2] for block in blocks for layer in block.layers}
    assert left == {"q_proj", "k_proj", "o_proj"}


def test_a_pattern_by_whole_names_where_ends_do_not_tell():
    model = llama(64, 128)
    odd = model.model.layers[1].mlp
    odd.down_proj = type(odd.down_proj)(72, 64, bias=False)
    _, remedy = refusal(model, replace(FOUR_BITS, groupsize=64))
    skip = re.search(r"--skip '(.*)'", remedy)[1]
    assert skip == r"^(model\.layers\.1\.mlp\.down_proj)$"
    check_layers(FORMATS["gptq"], find_blocks(model, skip), replace(FOUR_BITS, groupsize=64))


def test_a_format_that_holds_no_layer():
    """No other size, width or pattern would help."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4))
    scheme = replace(FOUR_BITS, groupsize=32)
    assert refusal(model, scheme, "compressed-tensors")[1] == "choose --format gptq"
    check_layers(FORMATS["gptq"], find_blocks(model), scheme)


def test_what_fits_is_not_refused():
    row = next(row for row in zoo.ROWS if row.name == "llama")
    for form in FORMATS.values():
        check_layers(form, find_blocks(row.build()), replace(FOUR_BITS, groupsize=32))


@pytest.mark.parametrize(
    ("widths", "form", "scheme", "expected"),
    [
        ((36, 52), "gptq", FOUR_BITS, "choose --format compressed-tensors --groupsize -1"),
        ((36, 52), "gptq_v2", FOUR_BITS, "choose --format compressed-tensors --groupsize -1"),
        (
            (80, 144),
            "gptq",
            LayerScheme(3, 32, True),
            "choose --format compressed-tensors --groupsize 16 or -1",
        ),
        (
            (80, 144),
            "gptq",
            LayerScheme(3, -1, True),
            "choose --format compressed-tensors, or choose --wbits 2,"
            " or choose --wbits 4, or choose --wbits 8",
        ),
        (
            (36, 52),
            "compressed-tensors",
            LayerScheme(4, 32, True, actorder=True),
            "choose --groupsize -1",
        ),
    ],
)
def test_two_things_change_where_one_does_not_do(widths, form, scheme, expected):
    blocks = find_blocks(llama(*widths))
    remedy = refusal(llama(*widths), scheme, form)[1]
    assert remedy == expected
    way = dict(re.findall(r"--(\w+) (\S+)", remedy.split(", or ")[0]))
    size = int(way.get("groupsize", scheme.groupsize))
    follows = scheme.actorder and size != -1
    fitting = replace(scheme, groupsize=size, actorder=follows)
    check_layers(FORMATS[way.get("format", form)], blocks, fitting)


def test_nothing_fits():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=38, n_layer=1, n_head=2))
    assert refusal(model, FOUR_BITS)[1] == "give another model: no options fit this one"
