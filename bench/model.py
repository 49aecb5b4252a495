"""The model and the token ids that every tool in the pipeline benchmark quantizes.

The weights are random: GPTQ's time depends on shapes, not on what the model learned, and a
model that can be built anywhere from a seed needs no download. The shapes are those of a small
Llama (61 million parameters) so that a run takes seconds. It is saved like any Hugging Face
checkpoint, with a tokenizer, because one of the peers will not load a model without.

    python bench/model.py FOLDER        writes FOLDER/model/ and FOLDER/tokens.pt
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 8000
SEQUENCES = 32
SEQUENCE_LENGTH = 512
SEED = 0


def build(folder: Path) -> tuple[Path, Path]:
    """Write the checkpoint and its calibration tokens, unless both are there already.

    Returns the checkpoint's folder and the file of token ids, an int64 tensor of shape
    ``[SEQUENCES, SEQUENCE_LENGTH]``. The same seed gives the same bytes.
    """
    checkpoint, tokens = folder / "model", folder / "tokens.pt"
    if tokens.exists():  # written last, so the checkpoint is whole as well
        return checkpoint, tokens
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(checkpoint)
    _tokenizer().save_pretrained(checkpoint)
    torch.save(torch.randint(4, VOCABULARY, (SEQUENCES, SEQUENCE_LENGTH)), tokens)
    return checkpoint, tokens


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
    for path in build(parser.parse_args().folder):
        print(path)
