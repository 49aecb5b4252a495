"""Train a small English model of another family: ``python bench/english.py opt OUT [TEXT..]``.

What is measured on the bundled model alone could be tuned to it. Two more, an OPT (learned
positions, LayerNorm, biases, ReLU) and a Qwen3 (normalised queries and keys, gated SiLU), learn
English: the docstrings of the libraries that OPTQ is developed with (12 MB), and text files. The
first 80% of each are for training, the next 10% for calibration (``calibration.txt``), the last
10% for evaluation (``evaluation.txt``). One pass: a model that has seen a text ten times is one
that quantization makes better on held-out text.
"""

import argparse
import ast
import copy
import importlib.util
import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OPTConfig, PretrainedConfig, Qwen3Config

from optq.demo.train import (
    ADAMW_RATE,
    BATCH,
    MUON_RATE,
    VOCABULARY,
    WINDOW,
    Batches,
    perplexity,
    rate_factor,
    train_tokenizer,
)

LIBRARIES = ("torch", "transformers", "pandas", "numpy", "sympy", "networkx")
CHARACTERS = 12_000_000
CONFIGS = {
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        ffn_dim=1536,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=WINDOW,
        word_embed_proj_dim=384,
        dropout=0.0,
    ),
    "qwen3": lambda: Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
    ),
}


def docstrings() -> str:
    """Of ``LIBRARIES``, each once, the longer ones, in random order."""
    found: dict[str, None] = {}
    for library in LIBRARIES:
        folder = Path(importlib.util.find_spec(library).origin).parent
        for path in sorted(folder.rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) > 200:
                        found[text] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts)[:CHARACTERS]


def split(texts: list[str]) -> tuple[list[str], str, str]:
    """Training texts, calibration text, evaluation text."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for text in texts:
        cuts = [0, int(0.8 * len(text)), int(0.9 * len(text)), len(text)]
        for part, start, stop in zip(parts, cuts, cuts[1:], strict=False):
            part.append(text[start:stop])
    return parts[0], "\n\n".join(parts[1]), "\n\n".join(parts[2])


def train(config: PretrainedConfig, texts: list[str], out: Path, steps: int) -> None:
    torch.set_num_threads(1)  # the two families are trained side by side
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    training, calibration, evaluation = split(texts)
    (out / "calibration.txt").write_text(calibration, encoding="utf-8")
    (out / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(out)
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    rows = tokenizer(training, verbose=False)["input_ids"]
    batches = Batches(torch.cat([torch.tensor(row) for row in rows]), seed=0)
    held_out = torch.tensor(tokenizer(evaluation, verbose=False)["input_ids"])
    print(f"{len(batches.stream)} tokens, {batches.steps_per_pass} steps in a pass", flush=True)

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if ".layers." in name and p.ndim == 2]
    chosen = set(matrices)
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.1),
        torch.optim.AdamW(
            [p for p in named.values() if p not in chosen],
            lr=ADAMW_RATE,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]
    compiled = torch.compile(model, dynamic=False)
    start, total = time.monotonic(), 0.0
    for step in range(steps):
        windows = batches[step]
        for shard in windows.split(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = compiled(input_ids=shard, labels=shard, use_cache=False).loss
            (loss * len(shard) / BATCH).backward()
            total += loss.item() * len(shard) / BATCH
        for optimizer, rate in zip(optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            speed = 50 * BATCH * WINDOW / (time.monotonic() - start)
            print(f"step {step + 1}/{steps} loss {total / 50:.3f}, {speed:.0f} tok/s", flush=True)
            start, total = time.monotonic(), 0.0
        if (step + 1) % 300 == 0 or step + 1 == steps:
            model.eval()
            print(
                f"held-out perplexity {perplexity(model, held_out[: 64 * WINDOW]):.3f}", flush=True
            )
            model.train()
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=CONFIGS)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    config = CONFIGS[arguments.family]()
    texts = [docstrings(), *(path.read_text(encoding="utf-8") for path in arguments.texts)]
    train(config, texts, arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
