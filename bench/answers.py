"""Answers that stay the same: ``python bench/answers.py MODEL VARIANT..``.

The model answers 20 fixed prompts greedily, through its chat template if it has one; counted are
the answers of which all of the first 20 tokens are full precision's. A variant is a folder that
``optq.load`` takes, or a setting that is quantized here as ``bench/quality.py`` does it: a name
from there, or ``default``, which here includes error propagation, followed by the bits: ``rtn4``,
``default3``, ``blocks3``, ``model3``.
"""

import argparse
import re
import statistics
from itertools import takewhile
from pathlib import Path

import torch
from quality import groupsize, quantize

import optq
from optq import ModelConfig

TOKENS = 20
PROMPTS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a haiku about the sea.",
    "Explain in one sentence why the sky is blue.",
    "Translate 'good morning' into Spanish.",
    "How many days are there in a week?",
    "Give me a short recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "What is 7 plus 5?",
    "List three fruits that are red.",
    "What does a doctor do?",
    "Write a polite email to decline an invitation.",
    "What is the opposite of hot?",
    "Describe a cat in two sentences.",
    "Why do we need to sleep?",
    "Give one tip for learning a new language.",
    "What is the largest planet in the solar system?",
    "Write a Python function that adds two numbers.",
    "Tell me a fun fact about elephants.",
    "Summarize what photosynthesis is.",
)


@torch.no_grad()
def answers(model, tokenizer) -> list[list[int]]:
    """The first tokens of each answer."""
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0]
        found.append(tokens[inputs["input_ids"].shape[1] :].tolist())
    return found


def load(model: str, variant: str, groupsize: int):
    if Path(variant).is_dir():
        return optq.load(variant, "cpu")
    name, wbits = re.fullmatch(r"(.+?)(\d)", variant).groups()
    name = "default+qep" if name == "default" else name
    return quantize(model, name, int(wbits), 0, groupsize)


def begun_alike(own: list[int], other: list[int]) -> int:
    """How many tokens, from the first on, are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, other, strict=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("variants", nargs="*")
    arguments = parser.parse_args()
    full, tokenizer = ModelConfig(arguments.model, "cpu").load()
    wanted = answers(full, tokenizer)
    for prompt, answer in zip(PROMPTS, wanted, strict=True):
        print(f"{prompt} {tokenizer.decode(answer, skip_special_tokens=True)!r}")
    for variant in arguments.variants:
        found = answers(load(arguments.model, variant, groupsize(full)), tokenizer)
        pairs = list(zip(wanted, found, strict=True))
        same = sum(own == other for own, other in pairs)
        begun = statistics.mean(begun_alike(*pair) for pair in pairs)
        print(f"{variant}: {same} of {len(PROMPTS)} the same; {begun:.1f} tokens, on average, are")


if __name__ == "__main__":
    main()
