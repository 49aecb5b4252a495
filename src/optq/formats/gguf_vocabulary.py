"""A tokenizer as llama.cpp reads it from a GGUF file: tokens, their types, and how to split text.

llama.cpp has two kinds for the models that :mod:`optq.formats.gguf` exports:

    gpt2    byte-level BPE: merges by rank, after one of the splits that it knows by name
    llama   SentencePiece: of all pairs that make a token, the token of the highest score first

It computes neither from a description, as the tokenizers package does, so a tokenizer must be one
of those it knows: anything else is refused. What is judged is the tokenizer that transformers
makes of the checkpoint, which may differ from what its tokenizer.json says.

Rejected: recognising a split by the tokens of a test text, as llama.cpp's converter does: it
knows published vocabularies only. Known differences: llama.cpp does not apply Qwen's Unicode
normalization (NFC), and sets a space before text that begins with one (kind llama).
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import gguf
from gguf import TokenType

from optq.errors import ModelError

REMEDY = "run the checkpoint with optq, transformers or vLLM instead"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {  # (split, whether whole words skip the merges): llama.cpp's name
    ("gpt2", False): "gpt-2",
    ("digits", False): "smollm",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_QWEN2, False): "qwen2",
}


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Write ``tokenizer`` for a model of ``config`` to the metadata.

    Raises :class:`ModelError` for a tokenizer that llama.cpp would not follow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(type(tokenizer).__name__)
    described = json.loads(backend.to_str())
    if described["model"]["type"] != "BPE":
        raise _unknown(described["model"]["type"])
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= config.vocab_size:
        raise ModelError(
            f"the tokenizer has token {largest}, and the model only {config.vocab_size} tokens",
            "use the tokenizer that belongs to the model",
        )
    types = dict.fromkeys(range(config.vocab_size), TokenType.UNUSED)
    types |= dict.fromkeys(vocabulary.values(), TokenType.NORMAL)
    for token in described["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    names = {number: token for token, number in vocabulary.items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    if described["model"]["byte_fallback"]:
        _add_pieces(writer, described, tokens, types)
    else:
        _add_merges(writer, described)
    writer.add_token_list(tokens)
    writer.add_token_types([int(types[number]) for number in range(config.vocab_size)])
    _add_special(writer, tokenizer, config)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _add_merges(writer: gguf.GGUFWriter, described: dict[str, Any]) -> None:
    """Byte-level BPE."""
    model, normalizer = described["model"], described["normalizer"]
    split = _split(described["pre_tokenizer"])
    name = SPLITS.get((split, bool(model["ignore_merges"]))) if split else None
    if name is None:
        raise _unknown(f"the pre-tokenizer {json.dumps(described['pre_tokenizer'])}")
    if normalizer not in (None, {"type": "NFC"}):
        raise _unknown(f"the normalizer {json.dumps(normalizer)}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([f"{left} {right}" for left, right in model["merges"]])


def _split(described: dict[str, Any] | None) -> str | None:
    """The regular expression, or a word for it, of a pre-tokenizer that ends in bytes."""
    steps = (described or {}).get("pretokenizers", [described])
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        return {0: "gpt2", 1: "digits" if steps[0] == _DIGITS else None}.get(len(steps) - 1)
    if len(steps) != 2 or steps[0]["type"] != "Split":
        return None
    plain = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
    return steps[0]["pattern"].get("Regex") if plain else None


def _add_pieces(
    writer: gguf.GGUFWriter,
    described: dict[str, Any],
    tokens: list[str],
    types: dict[int, TokenType],
) -> None:
    """SentencePiece's BPE, with bytes for what has no token."""
    model = described["model"]
    prefix = _space_prefix(described["normalizer"], described["pre_tokenizer"])
    if prefix is None:
        raise _unknown("how the tokenizer treats spaces")
    for number, token in enumerate(tokens):
        if types[number] == TokenType.NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[number] = TokenType.BYTE
        if token == model["unk_token"]:
            types[number] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    writer.add_token_scores(_scores(model, tokens, types))


def _space_prefix(normalizer: Any, splitter: Any) -> bool | None:
    """Whether text gets a space in front; None if spaces do not simply become ``SPACE``."""
    if splitter is not None:
        known = splitter["type"] == "Metaspace" and splitter["replacement"] == SPACE
        plain = known and not splitter["split"] and normalizer is None
        return splitter["prepend_scheme"] != "never" if plain else None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = (normalizer or {}).get("normalizers", [normalizer])
    if steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
        return True
    return False if steps == [replace] else None


def _scores(model: dict[str, Any], tokens: list[str], types: dict[int, TokenType]) -> list[float]:
    """A score for each token that ranks merges as the tokenizer does.

    llama.cpp merges any two pieces whose union is a token, the token of the highest score first:
    the same as BPE if the merges are all such pairs and stand in the order of what they make.
    Llama 2's runs of spaces tie, and may stand mixed: a run grows from its left either way.
    """
    order: dict[str, int] = {}
    made = ""
    for left, right in model["merges"]:
        mixed = left + right != made and left + right in order
        made = left + right
        if mixed and len({*made}) > 1:
            raise _unknown(f"the merges of {made!r}, which are not together")
        order.setdefault(made, len(order))
    pairs = {(left, right) for left, right in model["merges"]}
    vocabulary = model["vocab"]
    for number, token in enumerate(tokens):
        if types[number] != TokenType.NORMAL:
            continue
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in pairs and pair[0] in vocabulary and pair[1] in vocabulary:
                raise _unknown(f"merges without {' + '.join(map(repr, pair))}")
    # What is no merge comes last: its letters can meet in a text, and must not become one.
    return [-float(order.get(token, len(order))) for token in tokens]


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Special tokens, and which of them the tokenizer really puts around a text."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    found = [
        (begins, ends)
        for begins, ends in product((False, True), repeat=2)
        if [first] * begins + plain + [last] * ends == whole
    ]
    if not found:
        raise _unknown("what the tokenizer sets around a text")
    if last is None:
        last = _first_id(config.eos_token_id)
    if last is None:
        raise ModelError(
            "the tokenizer has no end token, and llama.cpp would take an ordinary one for it",
            "name one as eos_token in tokenizer_config.json",
        )
    if first is None:
        first = _first_id(config.bos_token_id)
    writer.add_eos_token_id(last)
    # llama.cpp takes an ordinary token where none is named.
    writer.add_bos_token_id(last if first is None else first)
    for number, add in (
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(found[0][0])
    writer.add_add_eos_token(found[0][1])


def _first_id(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def _unknown(what: str) -> ModelError:
    return ModelError(f"llama.cpp does not follow {what}", REMEDY)
