"""The table of models is itself tested: with plain hooks, and without the package under test."""

import pytest
import torch
import zoo
import zoo_configs as configs
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

WORKING = zoo.ROWS + zoo.MULTIMODAL


def named(row) -> str:
    return row.name


every_model = pytest.mark.parametrize("row", WORKING, ids=named)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    return model(input_ids=zoo.token_ids() if tokens is None else tokens, use_cache=False).logits


def layers_of(block: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def observed_sites(model: nn.Module, block: nn.Module) -> list[list[str]]:
    """Run the model once and group the block's calls by the very tensor, and version, they read."""
    inputs: list[tuple[Tensor, int]] = []  # holds each tensor, so that no address is used twice
    sites: list[list[str]] = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            (tensor,) = args
            for (seen, version), names in zip(inputs, sites, strict=True):
                if seen is tensor and version == tensor._version:
                    names.append(name)
                    return
            inputs.append((tensor, tensor._version))
            sites.append([name])

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name)) for name, layer in layers_of(block).items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return sites


def test_names_are_unique():
    names = [row.name for row in (*WORKING, *zoo.REFUSED)]
    assert len(set(names)) == len(names)


@every_model
def test_sites_are_what_hooks_see(row):
    model = row.build()
    blocks = model.get_submodule(row.blocks)
    assert isinstance(blocks, nn.ModuleList) and len(blocks) >= 2
    for index, block in enumerate(blocks):
        sites = row.sites_of(index)
        assert observed_sites(model, block) == [list(site) for site in sites]
        called = [name for site in sites for name in site]
        assert sorted([*called, *row.never_called]) == sorted(layers_of(block))


@every_model
def test_every_layer_can_be_packed(row):
    for block in row.build().get_submodule(row.blocks):
        for name, layer in layers_of(block).items():
            assert all(width % 32 == 0 for width in layer.weight.shape), name


@every_model
def test_a_build_is_finite_deterministic_and_in_its_dtype(row):
    torch.manual_seed(1)
    first = row.build()
    torch.manual_seed(2)
    second = row.build()
    assert first.dtype == row.dtype and not first.training
    assert logits(first).isfinite().all()
    assert torch.equal(logits(first), logits(second))


@every_model
def test_every_called_layer_and_every_earlier_token_changes_the_logits(row):
    model = row.build()
    before = logits(model)
    spread = before.float().std()

    tokens = zoo.token_ids()
    tokens[:, -4] = (tokens[:, -4] + 1) % configs.VISION_START
    after = logits(model, tokens)
    assert torch.equal(after[:, :-4], before[:, :-4]), "not causal"
    assert (after - before)[:, -1].float().abs().max() > 1e-2 * spread

    for index, block in enumerate(model.get_submodule(row.blocks)):
        for site in row.sites_of(index):
            for name in site:
                weight = block.get_submodule(name).weight.detach()
                saved = weight.clone()
                weight.view(-1)[::2] = 0  # not a factor, which a norm behind the layer would undo
                moved = (logits(model) - before).float().abs().max()
                assert moved > 1e-2 * spread, f"block {index}, {name}"
                weight.copy_(saved)
    assert torch.equal(logits(model), before)


SLIDING = {"mistral", "phi3", "starcoder2"}
MIXED = {
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gemma4_text",
    "cohere2",
    "olmo3",
    "smollm3",
}


@pytest.mark.parametrize("row", [row for row in WORKING if row.name in SLIDING | MIXED], ids=named)
def test_windows_are_shorter_than_the_sequence(row):
    model = row.build()
    config = model.config.get_text_config()
    if row.name in MIXED:
        assert set(config.layer_types) == {configs.FULL, configs.SLIDING}
    narrow = logits(model)
    assert config.sliding_window == configs.WINDOW
    config.sliding_window = 64
    wide = logits(model)
    assert torch.equal(narrow[:, : configs.WINDOW], wide[:, : configs.WINDOW])
    assert (narrow - wide)[:, configs.WINDOW :].abs().max() > 1e-2 * narrow.std()


def test_no_other_row_has_a_window():
    for row in WORKING:
        types = getattr(row.config().get_text_config(), "layer_types", None) or []
        assert (configs.SLIDING in types) <= (row.name in SLIDING | MIXED), row.name


def test_equal_norms_give_equal_inputs_at_different_sites():
    row = next(row for row in zoo.ROWS if row.name == "gpt_neox_equal_norms")
    model = row.build()
    block = model.get_submodule(row.blocks)[0]
    seen = {}
    for name in ("attention.query_key_value", "mlp.dense_h_to_4h"):
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    logits(model)
    first, second = seen.values()
    assert first is not second and torch.equal(first, second)


def test_tied_means_one_parameter():
    model = next(row for row in zoo.ROWS if row.name == "llama_tied").build()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@every_model
def test_a_saved_folder_loads_as_the_same_model(row, tmp_path):
    folder = zoo.save(row, tmp_path / "model")
    built = row.build()
    loaded = type(built).from_pretrained(folder, dtype="auto").eval()
    assert loaded.dtype == row.dtype
    assert torch.equal(logits(loaded), logits(built))


def test_the_tokenizer_keeps_ascii_text_and_its_special_tokens(tmp_path):
    text = "The end of the other theorem:\n\tx_1 = {2 * y}  # twice\n"
    zoo.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) and max(ids) < configs.IMAGE and configs.UNK not in ids
    assert tokenizer("é").input_ids == [configs.UNK]
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (configs.PAD, configs.BOS, configs.EOS)


@pytest.mark.parametrize("row", zoo.REFUSED, ids=named)
def test_refused_models_build(row):
    assert row.reason and not row.build().training
