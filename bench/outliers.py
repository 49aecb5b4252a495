"""Outlier channels, and the methods that meet them: ``python bench/outliers.py``.

The bundled model in float32, and the same with outliers planted: in every norm before a site the
weights of four channels, those whose activations are largest, are multiplied by ``k``, and the
columns of the layers that read them divided by it. ``k`` is a power of two, so the function is the
same to the bit. Then W8A8 with and without smoothing, LLM.int8(), and GPTQ with 8-bit weights
alone. The measure is how far the predictions diverge from full precision's (millinats a token);
beside it stands full precision's own noise: the bfloat16 model against the float32 one. One thread.
Rows go to bench/results/outliers.jsonl.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from machine import append, machine
from safetensors.torch import load_file, save_file

from optq import ModelConfig
from optq.compare import Comparison
from optq.data.evaluation import evaluation_tokens
from optq.demo import MODEL
from optq.evaluate.divergence import divergence
from optq.model.predictions import predictions

RESULTS = Path(__file__).parent / "results" / "outliers.jsonl"
SAMPLES, SEQLEN, CHANNELS = 32, 512, 4
METHODS = ("rtn", "gptq", "w8a8", "smoothquant", "llm-int8")
READ = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def largest_channels(windows: torch.Tensor) -> torch.Tensor:
    """The channels that are largest beside the others, over all norms before a site."""
    model = ModelConfig("demo", "cpu", "float32").load()[0]
    tops: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in READ:
            module.register_forward_hook(
                lambda m, x, y: tops.append(y.abs().flatten(0, -2).amax(0) / y.abs().mean())
            )
    with torch.no_grad():
        model(windows)
    return torch.stack(tops).mean(0).topk(CHANNELS).indices


def plant(folder: Path, channels: torch.Tensor, factor: int) -> None:
    """The bundled model with outliers in ``channels``."""
    shutil.copytree(MODEL, folder)
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    for name in list(state):
        norm = name.removesuffix(".weight").rpartition(".")[2]
        if norm not in READ:
            continue
        state[name][channels] *= factor
        block = name.removesuffix(f"{norm}.weight")
        for layer in READ[norm]:
            state[f"{block}{layer}.weight"][:, channels] /= factor
    save_file(state, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", default="1,8,32")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wide, tokenizer = ModelConfig("demo", "cpu", "float32").load()
    windows = evaluation_tokens("demo", tokenizer, SEQLEN)
    channels = largest_channels(windows[:16])
    dense = predictions(wide, [windows])[0]
    for factor in map(int, arguments.factors.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "planted"
            plant(place, channels, factor)
            half = ModelConfig(str(place), "cpu").load()[0]
            noise = divergence(half, dense, windows)
            record = machine() | {"factor": factor, "channels": channels.tolist()}
            record |= {"windows": len(windows), "noise": round(1e3 * noise.mean, 4)}
            record["noise_rise"] = round(noise.own.perplexity - noise.dense.perplexity, 4)
            config = ModelConfig(str(place), "cpu", "float32")
            options = (8,), (-1,), "demo", "demo", SAMPLES, SEQLEN
            rows = Comparison(config, METHODS, *options).run()
            for row in rows[1:]:
                far = round(1e3 * (row.divergence or 0.0), 4)
                record[row.method] = {"divergence": far, "rise": round(row.rise, 4)}
            record["full"] = round(rows[0].perplexity, 4)
        append(arguments.results, record)
        print(record, flush=True)


if __name__ == "__main__":
    main()
