"""Train a small English model of another family: ``python bench/english.py opt OUT [TEXT..]``.

What is measured on the bundled model alone could be tuned to it. Three more, an OPT (learned
positions, LayerNorm, biases, ReLU), a Qwen3 (normalised queries and keys, gated SiLU) and a
Qwen3-MoE (16 experts, 4 chosen, some of them rare), learn English: the docstrings of the libraries
that OPTQ is developed with (12 MB), and text files. The first 80% of each are for training, the
next 10% for calibration (``calibration.txt``), the last 10% for evaluation (``evaluation.txt``).
One pass: a model that has seen a text ten times is one that quantization makes better on held-out
text.

So that minutes are enough for the Qwen3-MoE it does not start from random weights but from the
bundled model ("sparse upcycling"): its embedding, attention and norms, and for each expert a random
256 of the 896 columns of its feed-forward. Its experts are rare because the loss that would spread
tokens evenly over them spreads them as ``SHARES`` says: ten experts get about two in five tokens
each, the last six 4% to 0.1%.
"""

import argparse
import ast
import copy
import importlib.util
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from optq.demo import MODEL
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
    "qwen3_moe": lambda: Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        moe_intermediate_size=256,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    ),
}
RARE = [0.04, 0.02, 0.01, 0.005, 0.0025, 0.00125]  # of tokens, for the last experts
SHARES = [(4 - sum(RARE)) / 10] * 10 + RARE
SPREAD = 0.1  # how strongly the loss pulls towards the shares
FURTHER = 0.3  # of the rates, for a model that does not start from random weights
FAR = 10.0  # an expert at more than so many times its share is pulled no harder


class WithLoss(torch.autograd.Function):
    """A tensor as it is, with a loss that is minimised along with the model's own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones((), device=gradient.device)


def spread(router: Any, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The Switch Transformer's loss that evens out experts' tokens, for shares that differ."""
    if not router.training:
        return None
    logits, scores, chosen = output
    got = torch.bincount(chosen.flatten(), minlength=len(SHARES)) / len(chosen)
    over = (got / torch.tensor(SHARES)).clamp(max=FAR)
    loss = SPREAD * (over * logits.float().softmax(-1).mean(0)).sum()
    return logits, WithLoss.apply(scores, loss), chosen


def experts(module: Any, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
    """Gated experts. The backward of transformers' own fills a gradient of all for each one."""
    half = x.to(torch.bfloat16)
    inner, down = (
        part.to(torch.bfloat16).unbind() for part in (module.gate_up_proj, module.down_proj)
    )
    total = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(len(inner)):
        tokens, places = (chosen == expert).nonzero().unbind(1)
        gate, up = linear(half[tokens], inner[expert]).chunk(2, dim=-1)
        out = linear(module.act_fn(gate) * up, down[expert]) * scores[tokens, places, None]
        total = total.index_add(0, tokens, out.float())
    return total.to(x.dtype)


ALL_EXPERTS_FUNCTIONS["trained"] = experts


@torch.no_grad()
def upcycle(model: Any) -> None:
    """Start a Qwen3-MoE from the bundled Llama of the same widths."""
    dense = dict(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).named_parameters()
    )
    for name, parameter in model.named_parameters():
        if name in dense:
            parameter.copy_(dense[name])
    for i, layer in enumerate(model.model.layers):
        inside, moe, attention = f"model.layers.{i}.mlp", layer.mlp.experts, layer.self_attn
        gate, up, down = (dense[f"{inside}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        for expert in range(len(SHARES)):
            part = torch.randperm(len(gate))[: moe.intermediate_dim]
            moe.gate_up_proj[expert] = torch.cat([gate[part], up[part]])
            moe.down_proj[expert] = down[:, part] * len(gate) / len(part)
        for norm, source in ((attention.q_norm, "q_proj"), (attention.k_norm, "k_proj")):
            seen = (
                dense[f"model.layers.{i}.self_attn.{source}.weight"] * layer.input_layernorm.weight
            )
            norm.weight.fill_(seen.square().sum(1).mean().sqrt())  # a Llama has no such norm


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


def train(config: PretrainedConfig, texts: list[str], out: Path, steps: int, threads: int) -> None:
    torch.set_num_threads(1)  # each thread has windows of its own
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    training, calibration, evaluation = split(texts)
    (out / "calibration.txt").write_text(calibration, encoding="utf-8")
    (out / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    sparse = isinstance(config, Qwen3MoeConfig)
    tokenizer = AutoTokenizer.from_pretrained(MODEL) if sparse else train_tokenizer(training)
    tokenizer.save_pretrained(out)
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    rows = tokenizer(training, verbose=False)["input_ids"]
    batches = Batches(torch.cat([torch.tensor(row) for row in rows]), seed=0)
    held_out = torch.tensor(tokenizer(evaluation, verbose=False)["input_ids"])
    print(f"{len(batches.stream)} tokens, {batches.steps_per_pass} steps in a pass", flush=True)

    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation="eager",
        experts_implementation="trained" if sparse else None,
    )
    if sparse:
        upcycle(model)
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(spread)
    named = dict(model.named_parameters())
    matrices = [
        p
        for name, p in named.items()
        if ".layers." in name and p.ndim == 2 and ".gate." not in name
    ]
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
    compiled = model if sparse else torch.compile(model, dynamic=False)
    parameters = list(model.parameters())

    def gradients(windows: Tensor) -> tuple[Tensor, ...]:
        """These windows' share of the batch's loss, and its gradient for every parameter."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # its cache is shared
            loss = compiled(input_ids=windows, labels=windows, use_cache=False).loss
        share = loss * len(windows) / BATCH
        return (share.detach(), *torch.autograd.grad(share, parameters))

    size = 2 if threads == 1 else BATCH // threads  # windows at a time
    gradients(batches[0][:size])  # compiles, before there are threads
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    start, total = time.monotonic(), 0.0
    for step in range(steps):
        shards = [
            sum(parts)
            for parts in zip(*pool.map(gradients, batches[step].split(size)), strict=True)
        ]
        total += shards[0].item()
        for parameter, gradient in zip(parameters, shards[1:], strict=True):
            parameter.grad = gradient
        for optimizer, rate in zip(optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, steps) * (FURTHER if sparse else 1)
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
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    config = CONFIGS[arguments.family]()
    texts = [docstrings(), *(path.read_text(encoding="utf-8") for path in arguments.texts)]
    train(config, texts, arguments.out, arguments.steps, arguments.threads)


if __name__ == "__main__":
    main()
