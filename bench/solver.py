"""The solver alone: OPTQ against the paper's algorithm written the usual way, on one layer.

4096 x 4096, 4 bits, groups of 128, symmetric, float32 on the CPU. ``W`` is gaussian at the scale
of a trained layer. ``H`` comes from activations, because a Hessian's spectrum decides how far
errors travel: the input of the down projection in one decoder layer of a random Llama that reads
16384 tokens of real text. (A random model will do for that: what a random matrix would lack is
the correlation of real token sequences passed through a nonlinear layer.)

    python bench/solver.py [--cache FOLDER] [--runs 5]

appends one record to bench/results/solver.jsonl and prints one line.
"""

import argparse
import importlib.util
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from machine import append, machine
from plain import plain_gptq
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from optq.core.gptq import GPTQ

SIZE, TOKENS, LENGTH, VOCABULARY, SEED = 4096, 16384, 512, 8000, 0
WBITS, GROUPSIZE = 4, 128
# Long modules of the standard library: real text that every Python has.
TEXT = ("argparse", "typing", "inspect", "doctest", "tarfile", "pydoc", "turtle", "subprocess")
RESULTS = Path(__file__).parent / "results" / "solver.jsonl"


def text_ids() -> Tensor:
    """Word ids ``[sequences, LENGTH]`` of the text; the vocabulary is its own commonest words."""
    sources = [Path(importlib.util.find_spec(name).origin).read_text("utf-8") for name in TEXT]
    words = re.findall(r"\w+|[^\w\s]", "\n".join(sources))[:TOKENS]
    if len(words) < TOKENS:
        raise SystemExit(f"the text has {len(words)} words; add modules to TEXT")
    ranked = [word for word, _ in Counter(words).most_common(VOCABULARY - 1)]
    ids = {word: i for i, word in enumerate(ranked, start=1)}
    return torch.tensor([ids.get(word, 0) for word in words]).view(-1, LENGTH)


def build_hessian() -> Tensor:
    """``H = X X^T / tokens``, float32, over bfloat16 activations.

    Not from OPTQ's own Hessian code: neither opponent's code makes the input of the comparison.
    """
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
    )
    model = LlamaModel(config).to(torch.bfloat16)
    H = torch.zeros(SIZE, SIZE)

    def add(_module: object, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        H.addmm_(x.T, x)

    model.layers[0].mlp.down_proj.register_forward_pre_hook(add)
    with torch.no_grad():
        for batch in text_ids().split(4):
            model(batch, use_cache=False)
    H /= TOKENS
    return (H + H.T) / 2


def cached_hessian(cache: Path) -> Tensor:
    """The Hessian from the cache folder, built there if need be."""
    file = cache / f"hessian-{SIZE}-{TOKENS}-{SEED}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(build_hessian(), file)
    return torch.load(file)


def layer_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """``tr((W - Q) H (W - Q)^T)`` in float64."""
    miss = W.double() - Q.double()
    return (miss @ H.double()).mul_(miss).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="keeps the Hessian")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    H = cached_hessian(args.cache)
    W = 0.02 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))
    gptq = GPTQ.plain(wbits=WBITS, groupsize=GROUPSIZE)
    tools = {
        "ours": lambda: gptq.solve(gptq.problem(H), W),
        "plain": lambda: plain_gptq(W, H, WBITS, GROUPSIZE, gptq.percdamp),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    result = {}
    for _ in range(args.runs):
        for name, solve in tools.items():  # alternately, so that a slow minute hits both
            start = time.perf_counter()
            result[name] = solve()
            seconds[name].append(round(time.perf_counter() - start, 4))

    median = {name: statistics.median(runs) for name, runs in seconds.items()}
    ratio = median["plain"] / median["ours"]
    error = {
        "ours": layer_error(W, result["ours"].weight, H),
        "plain": layer_error(W, result["plain"], H),
    }
    difference = error["ours"] / error["plain"] - 1
    append(
        RESULTS,
        {
            **machine(),
            "shape": [SIZE, SIZE],
            "wbits": WBITS,
            "groupsize": GROUPSIZE,
            "seconds": seconds,
            "median": median,
            "ratio": round(ratio, 3),
            "error": error,
            "error_difference": difference,
        },
    )
    print(
        f"{SIZE} x {SIZE}, {WBITS} bits, groups of {GROUPSIZE}: ours {median['ours']:.2f} s, "
        f"plain {median['plain']:.2f} s, ratio {ratio:.2f}, "
        f"error {100 * difference:+.3f} % against plain"
    )


if __name__ == "__main__":
    main()
