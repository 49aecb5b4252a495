"""Multi-token layers with experts, which transformers does not load: they travel along, dense."""

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_experts import CALIB, build, logits

from optq import RTN, ModelConfig, Runner, load
from optq.formats import FORMATS, detect, reader
from optq.formats.export import export
from optq.model.checkpoint import Checkpoint

# What is not a block's in the layer behind the last, and where the next one begins.
DEEPSEEK = {"eh_proj": (64, 128), "embed_tokens": (128, 64), "shared_head.head": (128, 64)}
NAMES = {"deepseek_v3": "model.layers.2.", "qwen3_5_moe": "mtp.layers.0."}


def with_drafts(name, folder):
    """A checkpoint of a model and a further layer, a copy of the last with other weights."""
    build(name).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    last, new = "model.layers.1.", NAMES[name]
    drafts = {n.replace(last, new): torch.randn_like(t) for n, t in state.items() if last in n}
    drafts |= {f"{new}{part}.weight": torch.randn(shape) for part, shape in DEEPSEEK.items()}
    if name == "qwen3_5_moe":  # as its own files have them: one tensor for all experts
        drafts = {n: t for n, t in drafts.items() if ".experts." not in n}
        drafts |= {f"{new}mlp.experts.gate_up_proj": torch.randn(4, 192, 64)}
        drafts |= {f"{new}mlp.experts.down_proj": torch.randn(4, 64, 96)}
    save_file(state | drafts, folder / "model.safetensors", metadata={"format": "pt"})
    return drafts


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", NAMES)
def test_they_travel_as_they_are_and_are_declared(tmp_path, name, form):
    drafts = with_drafts(name, tmp_path / "model")
    assert any(".experts." in each for each in drafts)
    config, options = ModelConfig(str(tmp_path / "model"), "cpu"), {"calib": CALIB, "format": form}
    whole = Runner(config, RTN(4, 32), **options).run().model
    run = Runner(config, RTN(4, 32), **options, output=tmp_path / "out").run()
    assert not any(NAMES[name] in layer.name for layer in run.layers)
    (other,) = {"compressed-tensors", "gptq"} - {form}
    export(Checkpoint.open(str(tmp_path / "out")), tmp_path / "there", FORMATS[other])
    for place in ("out", "there"):
        checkpoint = Checkpoint.open(str(tmp_path / place))
        found = dict(checkpoint.tensors(list(drafts)))
        assert all(torch.equal(found[each], drafts[each]) for each in drafts)
        scheme = detect(checkpoint)
        matrices = [n.removesuffix(".weight") for n, t in drafts.items() if t.ndim == 2]
        assert len(matrices) > 10 and not any(scheme.layer(each) for each in matrices)
        assert all(scheme.layer(each) for each in reader.quantized_layers(checkpoint))
        settings = checkpoint.config()["quantization_config"]
        if "ignore" in settings:
            assert {*matrices} <= {*settings["ignore"]}
            assert "re:.*mtp.*" in settings["ignore"] or "mtp" not in NAMES[name]
        else:
            layer = NAMES[name].partition(".layers.0")[0].rstrip(".").replace(".", r"\.")
            assert rf"-:^{layer}(\.|$)" in settings["dynamic"]
        wanted = logits(whole)
        assert (logits(load(tmp_path / place, "cpu")) - wanted).norm() < 0.05 * wanted.norm()


def test_experts_in_one_tensor_on_disk_where_others_have_one_each(tmp_path):
    """As some files of Qwen3.5 have them; packed, each has its own."""
    model = build("qwen3_5_moe")
    for place, state in (("one", model.state_dict()), ("each", None)):
        model.save_pretrained(tmp_path / place)
        zoo.tokenizer().save_pretrained(tmp_path / place)
        if state is not None:
            save_file(state, tmp_path / place / "model.safetensors", metadata={"format": "pt"})
        options = {
            "calib": CALIB,
            "output": tmp_path / f"{place}-4",
            "format": "compressed-tensors",
        }
        Runner(ModelConfig(str(tmp_path / place), "cpu"), RTN(4, 32), **options).run()
    fused = load_file(tmp_path / "one" / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    one, each = (load_file(tmp_path / f"{n}-4" / "model.safetensors") for n in ("one", "each"))
    assert one.keys() == each.keys() and all(torch.equal(one[n], each[n]) for n in one)
