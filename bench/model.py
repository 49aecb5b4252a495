"""The models and the token ids that every tool in the pipeline benchmark quantizes.

The weights are random: GPTQ's time depends on shapes, not on what the model learned, and a
model that can be built anywhere from a seed needs no download. ``llama`` has the shapes of a small
one (61 million parameters) so that a run takes seconds; ``experts`` is one block of Qwen3-30B-A3B's
(hidden 2048, 128 experts of 768, 8 chosen: 0.6 billion). They are saved like any Hugging Face
checkpoint, with a tokenizer, because one of the peers will not load a model without.

    python bench/model.py FOLDER [KIND]        writes FOLDER/KIND/ and FOLDER/KIND.pt
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

VOCABULARY = 8000
SEQUENCES = 32
SEQUENCE_LENGTH = 512
SEED = 0


COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        **COMMON,
    ),
    "experts": Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        **COMMON,
    ),
}


def build(folder: Path, kind: str = "llama") -> tuple[Path, Path]:
    """Write the checkpoint and its calibration tokens, unless both are there already.

    Returns the checkpoint's folder and the file of token ids, an int64 tensor of shape
    ``[SEQUENCES, SEQUENCE_LENGTH]``. The same seed gives the same bytes.
    """
    checkpoint, tokens = folder / kind, folder / f"{kind}.pt"
    if tokens.exists():  # written last, so the checkpoint is whole as well
        return checkpoint, tokens
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    save(CONFIGS[kind], checkpoint)
    torch.save(random_tokens(SEQUENCES, SEQUENCE_LENGTH), tokens)
    return checkpoint, tokens


def save(config: PreTrainedConfig, checkpoint: Path) -> None:
    """A checkpoint of this configuration, in bfloat16."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(checkpoint)
    _tokenizer().save_pretrained(checkpoint)


def random_tokens(sequences: int, length: int) -> torch.Tensor:
    """Ids ``[sequences, length]``, special ones aside."""
    return torch.randint(4, VOCABULARY, (sequences, length))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One made-up word per id: enough for a loader that insists on a tokenizer."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = special + [f"w{i}" for i in range(len(special), VOCABULARY)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", nargs="?", choices=CONFIGS, default="llama")
    arguments = parser.parse_args()
    for path in build(arguments.folder, arguments.kind):
        print(path)
