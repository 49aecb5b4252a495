"""Exported files, read by the gguf package's own reader and dequantizer."""

import errno
import json
import re
import shutil
import weakref
from collections import namedtuple
from functools import partial
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
import zoo
import zoo_configs
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from optq import GPTQ, RTN, ModelConfig, Runner
from optq.core.weight import QuantizedWeight, group_index
from optq.errors import ModelError, OutputError, SettingError
from optq.formats import gguf as gguf_file
from optq.formats import reader
from optq.formats.gguf import export_gguf
from optq.formats.gguf_blocks import choose, encode
from optq.model.checkpoint import Checkpoint

VOCAB, WORDS = 384, 340  # of the model, of the tokenizer
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
ROUND = RTN(4, 32)
Exported = namedtuple("Exported", "checkpoint file facts fields tensors")


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_experts": 4}
LOCAL = {"num_experts_per_tok": 2, "intermediate_size": 64, "num_local_experts": 4}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 96}


def model(kind: str, dtype=torch.float32, **changes):
    config = getattr(transformers, f"{kind}Config")
    row = zoo.Row(kind, lambda: config(**SIZES | changes), "model.layers", (), dtype=dtype)
    return row.build()


MODELS = {
    "llama": lambda: model("Llama", attention_bias=True, mlp_bias=True),
    "llama_wide": lambda: model("Llama", torch.bfloat16, head_dim=64, tie_word_embeddings=True),
    "llama3": lambda: model("Llama", rope_parameters=LLAMA3),
    "mistral": lambda: model("Mistral", torch.float16, sliding_window=None),
    "qwen2": lambda: model("Qwen2", torch.bfloat16, tie_word_embeddings=True),
    "qwen3": lambda: model("Qwen3", torch.float16, head_dim=64),
    "mixtral": lambda: model("Mixtral", torch.bfloat16, **LOCAL),
    "qwen2_moe": lambda: model("Qwen2Moe", torch.bfloat16, **SHARED),
    "qwen3_moe": lambda: model("Qwen3Moe", head_dim=64, norm_topk_prob=True, **EXPERTS),
    "olmoe": lambda: model("Olmoe", num_key_value_heads=4, num_experts=4, num_experts_per_tok=2),
}


def byte_level(split=None, ignore_merges=False, bos=False) -> PreTrainedTokenizerFast:
    """Byte-level BPE; ``split`` is a regular expression, None GPT-2's own, digits SmolLM's."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "digits":
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer]
        )
    elif split:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=WORDS - 1,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator([Path(__file__).read_text()], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|start|>", eos_token="<|end|>"
    )
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def sentence_pieces(change=lambda merges: None, first="prepend") -> PreTrainedTokenizerFast:
    """What a Llama 2 checkpoint has: pieces, and all pairs that make one, in their order."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["th", "the", "▁t", "▁th", "▁the", "he", "in", "▁i", "▁in", "▁▁", "▁▁▁", "▁▁▁▁"]
    letters = sorted({letter for word in words for letter in word})
    vocabulary = {token: i for i, token in enumerate(special + pieces + letters + words)}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    change(merges)
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "▁")
    if first == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif first == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = replace
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """Checkpoints of ``MODELS``, quantized once each. To be read only."""
    done = {}

    def checkpoint(name="llama", quantizer=ROUND, **options) -> Checkpoint:
        key = (name, quantizer, *options.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("gguf")
            MODELS[name]().save_pretrained(folder / "source")
            byte_level().save_pretrained(folder / "source")
            config = ModelConfig(str(folder / "source"), "cpu")
            ids = torch.randint(2, WORDS, (4, 24))
            Runner(config, quantizer, calib=ids, output=folder / "out", **options).run()
            done[key] = Checkpoint.open(str(folder / "out"))
        return done[key]

    return checkpoint


@pytest.fixture
def copy(checkpoint_of, tmp_path):
    """A checkpoint of one's own, with another tokenizer or with changes to its config."""

    def copied(name="llama", tokenizer=None, **changes) -> Checkpoint:
        folder = tmp_path / "out"
        shutil.copytree(checkpoint_of(name).folder, folder)
        if tokenizer is not None:
            for path in folder.glob("tokenizer*"):
                path.unlink()
            tokenizer.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return Checkpoint.open(str(folder))

    return copied


@pytest.fixture
def export(tmp_path):
    def exported(checkpoint: Checkpoint) -> Exported:
        facts = export_gguf(checkpoint, tmp_path / "model.gguf", force=True)
        found = gguf.GGUFReader(tmp_path / "model.gguf")
        fields = {name: field.contents() for name, field in found.fields.items()}
        tensors = {tensor.name: tensor for tensor in found.tensors}
        return Exported(checkpoint, tmp_path / "model.gguf", facts, fields, tensors)

    return exported


def values(tensor) -> Tensor:
    return torch.from_numpy(dequantize(np.array(tensor.data), tensor.tensor_type))


def as_transformers(rows: Tensor, heads: int) -> Tensor:
    """Rows in transformers' order, from llama.cpp's, one by one."""
    size = len(rows) // heads
    ordered = torch.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                ordered[head * size + half * (size // 2) + i] = rows[head * size + 2 * i + half]
    return ordered


PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def place(name: str) -> str:
    """llama.cpp's name of a tensor, spelled out here a second time."""
    layer, _, suffix = name.rpartition(".")
    if layer in OUTSIDE:
        return f"{OUTSIDE[layer]}.{suffix}"
    _, _, block, inside = layer.split(".", 3)
    return f"blk.{block}.{PLACES[inside]}.{suffix}"


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of a block in one tensor, and the gate of a shared one in one row."""
    found = {}
    for name, tensor in tensors.items():
        if inside := re.match(r"(.*\.experts)\.(\d+)(\..*)", name):
            found.setdefault(inside[1] + inside[3], {})[int(inside[2])] = tensor
        else:
            found[name] = tensor[0] if "shared_expert_gate" in name else tensor
    return {
        n: torch.stack([t[e] for e in range(len(t))]) if isinstance(t, dict) else t
        for n, t in found.items()
    }


def check_tensors(made: Exported) -> None:
    """Every tensor of the checkpoint is in the file, bit for bit, and no other one."""
    checkpoint, config = made.checkpoint, made.checkpoint.config()
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    layers = {
        f"{n}.weight": reader.read_layer(checkpoint, n) for n in reader.quantized_layers(checkpoint)
    }
    expected = {name: layer.weight for name, layer in layers.items()}
    scales = stacked({name: layer.scales.abs().max() for name, layer in layers.items()})
    parts = ("qweight", "qzeros", "scales", "g_idx")
    dense = {n: t for n, t in checkpoint.tensors() if n.rpartition(".")[2] not in parts}
    expected, dense = stacked(expected | dense), stacked(dense)
    assert {place(name) for name in expected} == {*made.tensors} - {"rope_freqs.weight"}
    for name, tensor in expected.items():
        found = made.tensors[place(name)]
        back = values(found)
        if "LlamaForCausalLM" in config["architectures"] or config["model_type"] in (
            "mistral",
            "mixtral",
        ):
            for part, count in heads.items():
                if part in name:
                    back = as_transformers(back, count)
        assert list(found.shape)[::-1] == list(tensor.shape)
        if found.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            moved = (back - tensor).abs() / scales[name].max()
            assert moved.max() <= made.facts["minimum_moved"] + 1e-7
        else:
            assert torch.equal(back, tensor.float()), name
        if name in dense:
            dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
            router = name.endswith(".gate.weight")
            dtype = "F32" if tensor.ndim == 1 or router else dtypes[tensor.dtype]
            assert found.tensor_type.name == dtype


CASES = [
    ("llama", RTN(4, 32), "Q4_0"),
    ("llama", RTN(8, 128), "Q8_0"),
    ("llama_wide", GPTQ.plain(4, 128), "Q4_0"),
    ("llama_wide", RTN(2, 32), "Q4_0"),
    ("llama_wide", RTN(4, 32, sym=False), "Q4_1"),
    ("llama3", RTN(3, -1, sym=False), "Q4_0"),
    ("mistral", RTN(8, -1), "Q8_0"),
    ("mistral", GPTQ.plain(3, 64, actorder=True, static_groups=True), "Q4_0"),
    ("qwen2", RTN(4, -1), "Q4_0"),
    ("qwen2", RTN(2, 128, sym=False), "Q4_0"),
    ("qwen3", RTN(3, 128), "Q4_0"),
    ("qwen3", RTN(4, -1, sym=False), "Q4_1"),
]


@pytest.mark.parametrize(("name", "quantizer", "kind"), CASES, ids=str)
def test_the_file_holds_the_checkpoints_weights(checkpoint_of, export, name, quantizer, kind):
    exported = export(checkpoint_of(name, quantizer))
    check_tensors(exported)
    assert exported.facts["tensors"][kind] == 14
    assert sum(exported.facts["tensors"].values()) == len(exported.tensors)
    assert exported.facts["bytes"] == exported.file.stat().st_size
    assert exported.facts["file"] == str(exported.file)
    # Half a unit in the last of fp16's 11 bits, of a minimum of at most 15 steps.
    moved = exported.facts["minimum_moved"]
    assert 0 < moved <= 16 * 2**-11 if kind == "Q4_1" else moved == 0
    assert exported.fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]


SPARSE = [
    ("mixtral", RTN(4, 32), "Q4_0", 2 * 7),
    ("mixtral", RTN(4, 64, sym=False), "Q4_1", 2 * 7),
    ("qwen2_moe", RTN(3, 32, sym=False), "Q4_0", 2 * 10),
    ("qwen3_moe", RTN(4, 32), "Q4_0", 2 * 7),
    ("qwen3_moe", RTN(8, -1), "Q8_0", 2 * 7),
    ("olmoe", GPTQ.plain(2, 64), "Q4_0", 2 * 7),
]


@pytest.mark.parametrize(("name", "quantizer", "kind", "count"), SPARSE, ids=str)
def test_experts_are_one_tensor(checkpoint_of, export, name, quantizer, kind, count):
    exported = export(checkpoint_of(name, quantizer, qep=False))
    check_tensors(exported)
    assert exported.facts["tensors"][kind] == count
    assert list(exported.tensors["blk.1.ffn_down_exps.weight"].shape)[1:] == [128, 4]
    assert exported.tensors["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"


def test_experts_left_dense_are_one_tensor_too(checkpoint_of, export):
    exported = export(checkpoint_of("mixtral", skip=r"layers\.0\.mlp\.experts", qep=False))
    check_tensors(exported)
    assert exported.facts["tensors"]["Q4_0"] == 14 - 3
    assert exported.tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "BF16"


def test_experts_are_read_one_at_a_time(checkpoint_of, export, monkeypatch):
    """Their blocks are in memory once, and beside them those of one expert."""
    stack, seen = gguf_file._stack, []

    def one_at_a_time(reads):
        alive = []

        def watched(read):
            assert all(each() is None for each in alive)
            tensor = read()
            alive.append(weakref.ref(tensor))
            return tensor

        whole = stack([partial(watched, read) for read in reads])
        seen.append(len(alive))
        return whole

    monkeypatch.setattr(gguf_file, "_stack", one_at_a_time)
    export(checkpoint_of("qwen3_moe", qep=False))
    assert seen == [4] * 6


def test_experts_of_two_kinds_are_refused(checkpoint_of, copy):
    """llama.cpp has one type for all of a block."""
    checkpoint, other = copy("mixtral"), checkpoint_of("mixtral", RTN(8, 32))
    name = "model.layers.0.block_sparse_moe.experts.1.w2"
    parts = {n: t for n, t in other.tensors() if n.startswith(name)}
    changed = with_tensors(checkpoint, lambda state: state.update(parts))
    path = changed.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["dynamic"] = {f"+:{name}": {"bits": 8}}
    path.write_text(json.dumps(config))
    cause = "the experts of .* in one tensor, and these are Q4_0 and Q8_0"
    refused(Checkpoint.open(str(changed.folder)), SettingError, cause)


@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors"])
def test_other_formats_can_be_exported(checkpoint_of, export, form):
    exported = export(checkpoint_of("qwen2", format=form))
    assert exported.facts["tensors"]["Q4_0"] == 14


def test_layers_left_dense_stay_as_they_are(checkpoint_of, export):
    exported = export(checkpoint_of("llama_wide", skip=r"0\.self_attn\.[qv]_proj"))
    check_tensors(exported)
    assert exported.facts["tensors"] == {"F32": 5, "Q4_0": 12, "BF16": 3}


def test_the_same_bytes_twice(checkpoint_of, tmp_path):
    checkpoint = checkpoint_of()
    one, two = tmp_path / "one" / "m.gguf", tmp_path / "two" / "m.gguf"
    export_gguf(checkpoint, one)
    export_gguf(checkpoint, two)
    assert one.read_bytes() == two.read_bytes()


# Metadata.


def test_settings_of_a_llama(checkpoint_of, export):
    fields = export(checkpoint_of("llama_wide")).fields
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "model",
        "general.quantization_version": 2,
        "llama.vocab_size": VOCAB,
        "llama.context_length": 64,
        "llama.embedding_length": 128,
        "llama.block_count": 2,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert "llama.rope.scaling.type" not in fields


SPARSE_SETTINGS = {
    "mixtral": {"feed_forward_length": 64, "rope.dimension_count": 32},
    "qwen2_moe": {
        "feed_forward_length": 256,
        "expert_feed_forward_length": 64,
        "expert_shared_feed_forward_length": 96,
    },
    "qwen3_moe": {
        "feed_forward_length": 256,
        "expert_feed_forward_length": 64,
        "attention.key_length": 64,
    },
    "olmoe": {"feed_forward_length": 256},
}


@pytest.mark.parametrize("name", SPARSE_SETTINGS)
def test_settings_of_experts(checkpoint_of, export, name):
    fields = export(checkpoint_of(name, qep=False)).fields
    arch = {"mixtral": "llama"}.get(name, name.replace("_", ""))
    expected = {"expert_count": 4, "expert_used_count": 2, **SPARSE_SETTINGS[name]}
    expected = {f"{arch}.{key}": value for key, value in expected.items()}
    assert {key: fields[key] for key in expected} == expected
    assert fields["general.architecture"] == arch
    shared = f"{arch}.expert_shared_feed_forward_length" in fields
    assert shared is (name == "qwen2_moe")


@pytest.mark.parametrize(("name", "arch"), [("mistral", "llama"), ("qwen2", "qwen2")])
def test_the_architecture(checkpoint_of, export, name, arch):
    fields = export(checkpoint_of(name)).fields
    assert fields["general.architecture"] == arch and fields[f"{arch}.block_count"] == 2


def test_llama_3_scales_its_frequencies(checkpoint_of, export):
    exported = export(checkpoint_of("llama3"))
    assert exported.fields["llama.rope.freq_base"] == 5000.0
    factors = values(exported.tensors["rope_freqs.weight"])
    ours = MODELS["llama3"]().model.rotary_emb.inv_freq
    plain = torch.tensor([5000.0 ** (-2 * i / 32) for i in range(16)])
    assert torch.allclose(plain / factors, ours, rtol=1e-6)
    assert factors[0] == 1 and factors[-1] == pytest.approx(4)


def test_linear_scaling(copy, export):
    rope = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
    fields = export(copy("qwen2", rope_parameters=rope)).fields
    assert fields["qwen2.rope.scaling.type"] == "linear"
    assert fields["qwen2.rope.scaling.factor"] == 2.0
    assert fields["qwen2.rope.freq_base"] == 1e6


# Tokenizers.

KINDS = [
    ("gpt-2", {}),
    ("smollm", {"split": "digits"}),
    ("qwen2", {"split": QWEN_SPLIT}),
    ("llama-bpe", {"split": LLAMA_SPLIT, "ignore_merges": True, "bos": True}),
    ("dbrx", {"split": LLAMA_SPLIT}),
]


@pytest.mark.parametrize(("pre", "options"), KINDS, ids=str)
def test_byte_level_tokenizers(copy, export, pre, options):
    tokenizer = byte_level(**options)
    tokenizer.chat_template = "{{ messages }}"
    fields = export(copy(tokenizer=tokenizer)).fields
    types = fields["tokenizer.ggml.token_type"]
    tokens = fields["tokenizer.ggml.tokens"]
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == pre
    assert tokens[:WORDS] == tokenizer.convert_ids_to_tokens(list(range(WORDS)))
    assert tokens[WORDS:] == [f"[PAD{number}]" for number in range(WORDS, VOCAB)]
    assert len(set(tokens)) == VOCAB
    assert types[:2] == [gguf.TokenType.CONTROL] * 2
    assert types[2 : WORDS - 1] == [gguf.TokenType.NORMAL] * (WORDS - 3)
    assert tokens[WORDS - 1] == "<think>"
    assert types[WORDS - 1] == gguf.TokenType.USER_DEFINED
    assert types[WORDS:] == [gguf.TokenType.UNUSED] * (VOCAB - WORDS)
    merges = described["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges] and merges
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is options.get("bos", False)
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_several_chat_templates(copy, export):
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    fields = export(copy(tokenizer=tokenizer)).fields
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_no_bos_token_and_an_end_that_is_added(copy, export):
    tokenizer = byte_level()
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 1)]
    )
    fields = export(copy(tokenizer=tokenizer, bos_token_id=None)).fields
    assert fields["tokenizer.ggml.bos_token_id"] == 1  # else llama.cpp takes an ordinary one
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.add_eos_token"] is True


def mix_spaces(merges):
    """As transformers 5 does with pieces of equal score: the longest left part first."""
    spaces = [pair for pair in merges if {*"".join(pair)} == {"▁"}]
    merges[-len(spaces) :] = sorted(spaces, key=lambda pair: (-len(pair[0]), -len(pair[1])))


@pytest.mark.parametrize("change", [lambda merges: None, mix_spaces], ids=["in order", "mixed"])
@pytest.mark.parametrize("first", ["prepend", "metaspace", "nothing"])
def test_sentence_pieces(copy, export, change, first):
    tokenizer = sentence_pieces(change, first)
    fields = export(copy(tokenizer=tokenizer)).fields
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is (first != "nothing")
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.unknown_token_id"] == 0
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    types = fields["tokenizer.ggml.token_type"]
    kind = gguf.TokenType
    assert types[:3] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    assert types[3:259] == [kind.BYTE] * 256
    assert types[259 : len(tokenizer)] == [kind.NORMAL] * (len(tokenizer) - 259)
    scores = dict(
        zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True)
    )
    for text in ("the thin hint in the inn", "in" + " " * 11 + "the", "é the"):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        spaced = " " * (first != "nothing") + text
        assert greedy(spaced, scores) == tokenizer.convert_ids_to_tokens(expected)


def greedy(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece: join the two neighbours that make the best token, until none do."""
    parts = list(text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in pairwise(parts)]
        best = max((scores[x] for x in joined if x in scores), default=None)
        if best is None:
            break
        at = next(i for i, x in enumerate(joined) if scores.get(x) == best)
        parts[at : at + 2] = [joined[at]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
    ]


# Blocks.


def weight_of(wbits, zeros, scales, cols=64, groups=2, g_idx=None) -> QuantizedWeight:
    codes = torch.arange(2 * cols).view(2, cols).remainder(2**wbits).to(torch.uint8)
    shape = (2, groups)
    return QuantizedWeight(
        wbits,
        codes,
        torch.as_tensor(scales, dtype=torch.float32).expand(shape).contiguous(),
        torch.as_tensor(zeros, dtype=torch.uint8).expand(shape).contiguous(),
        group_index(cols, cols // groups, torch.device("cpu")) if g_idx is None else g_idx,
    )


BLOCKS = [
    (2, [[0, 3], [2, 1]], "Q4_0"),
    (3, [[0, 7], [4, 1]], "Q4_0"),
    (4, 8, "Q4_0"),
    (4, [[0, 15], [8, 3]], "Q4_1"),
    (8, 128, "Q8_0"),
]


@pytest.mark.parametrize(("wbits", "zeros", "kind"), BLOCKS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_hold_what_fp16_holds(wbits, zeros, kind, sign, groups):
    zeros = torch.as_tensor(zeros)
    zeros = zeros[:, :groups] if zeros.ndim else zeros
    scales = sign * torch.tensor([[0.01171875, 1.5], [0.0, 3.0]])[:, :groups]
    layer = weight_of(wbits, zeros, scales, groups=groups)
    chosen, moved = choose(layer, "layer")
    assert (chosen.name, moved) == (kind, 0.0)
    assert torch.equal(
        torch.from_numpy(dequantize(encode(layer, chosen).numpy(), chosen)), layer.weight
    )


def test_a_minimum_that_fp16_does_not_hold():
    scale = float(np.float16(0.1))  # 0.0999755859375, 11 bits: times 3 needs 12
    layer = weight_of(4, 3, scale)
    kind, moved = choose(layer, "layer")
    back = torch.from_numpy(dequantize(encode(layer, kind).numpy(), kind))
    assert kind.name == "Q4_1"
    assert moved == pytest.approx(abs(float(np.float16(3 * scale)) - 3 * scale) / scale)
    assert 0 < moved < 2**-9
    assert float((back - layer.weight).abs().max()) == pytest.approx(moved * scale)


SHUFFLED = torch.tensor([0, 1] * 32, dtype=torch.int32)
BAD_BLOCKS = [
    ({"cols": 48, "groups": 1}, "48 columns are no multiple of 32"),
    ({"groups": 4}, "groups of 16 columns"),
    ({"g_idx": SHUFFLED}, "follow the order of quantization"),
    ({"scales": 1e-9}, "float16 does not hold its scales"),
    ({"scales": 1e6}, "float16 does not hold its scales"),
    ({"scales": 30000.0, "zeros": 15}, "float16 does not hold its minima"),
    ({"wbits": 8, "zeros": 127}, "asymmetric at 8 bits"),
]


@pytest.mark.parametrize(("changes", "cause"), BAD_BLOCKS, ids=str)
def test_layers_that_no_block_holds(changes, cause):
    with pytest.raises(SettingError, match=cause) as caught:
        choose(weight_of(**{"wbits": 4, "zeros": 8, "scales": 1.0} | changes), "the.layer")
    assert "the.layer" in caught.value.cause and "\n" not in caught.value.remedy


# Refusals: nothing is left behind by any of them.


def refused(checkpoint, kind, cause, force=False, name="deep/model.gguf"):
    folder = checkpoint.folder.parent
    before = sorted(path for path in folder.rglob("*"))
    with pytest.raises(kind, match=cause) as caught:
        export_gguf(checkpoint, folder / name, force)
    assert sorted(path for path in folder.rglob("*")) == before
    assert "\n" not in caught.value.cause and "\n" not in caught.value.remedy


def sparse(kind, **changes):
    sizes = SIZES | (LOCAL if kind == "Mixtral" else SHARED) | changes
    return lambda: getattr(transformers, f"{kind}Config")(**sizes)


REFUSED_MODELS = [
    (zoo_configs.gemma2, "gemma2 model .*: nobody has compared"),
    (zoo_configs.deepseek_v3, "deepseek_v3 model .*: .* latent attention transposed"),
    (zoo_configs.gpt_oss, "gpt_oss model .*: nobody has compared"),
    (zoo_configs.granite_moe, "granitemoe model .*: nobody has compared"),
    (zoo_configs.ernie_moe, "ernie4_5_moe model .*: nobody has compared"),
    (zoo_configs.glm4_moe, "glm4_moe model .*: nobody has compared"),
    (zoo_configs.phimoe, "phimoe model .*: .* by another rule"),
    (zoo_configs.jamba, "jamba model .*: .* recurrent layers in a form of its own"),
    (zoo_configs.nemotron_h, "nemotron_h model .*: .* recurrent layers"),
    (zoo_configs.qwen3_next, "qwen3_next model .*: .* recurrent layers"),
    (sparse("Mixtral", sliding_window=8), "attention to the last 8 tokens"),
    (sparse("Qwen3Moe", head_dim=32), "experts' weights that do not sum to one"),
    (sparse("Qwen3Moe", norm_topk_prob=True, attention_bias=True), "biases in the attention"),
    (sparse("Qwen3Moe", norm_topk_prob=True, mlp_only_layers=[0]), "blocks without experts"),
    (sparse("Qwen2Moe", norm_topk_prob=True), "experts' weights that sum to one"),
    (sparse("Qwen2Moe", decoder_sparse_step=2), "blocks without experts"),
    (sparse("Qwen2Moe", tie_word_embeddings=True), "a head that is the embedding"),
    (sparse("Qwen2Moe", num_experts=1, num_experts_per_tok=1), "a single expert"),
    (sparse("Olmoe"), "keys and values that several heads share"),
    (sparse("Olmoe", num_key_value_heads=4, clip_qkv=8.0), "clipped to 8"),
    (lambda: MistralConfig(**SIZES, sliding_window=8), "attention to the last 8 tokens"),
    (
        lambda: transformers.Qwen3Config(
            **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        "attention to the last 8 tokens",
    ),
    (lambda: transformers.Qwen3Config(**SIZES, attention_bias=True), "biases in the attention"),
    (lambda: transformers.Qwen2Config(**SIZES, head_dim=64), "heads"),
    (lambda: transformers.Qwen2Config(**SIZES, rope_parameters=LLAMA3), "llama3"),
    (lambda: LlamaConfig(**SIZES, hidden_act="gelu"), "gelu"),
    (
        lambda: LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
        ),
        "yarn",
    ),
]


@pytest.mark.parametrize(
    ("config", "cause"), REFUSED_MODELS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_models_that_llama_cpp_would_not_run_as_they_are(tmp_path, config, cause):
    zoo.save(zoo.Row("refused", config, "model.layers", ()), tmp_path / "out")
    refused(Checkpoint.open(str(tmp_path / "out")), ModelError, cause)


def test_a_window_as_long_as_the_positions_is_none(copy, export):
    assert export(copy("mistral", sliding_window=64)).facts["tensors"]["Q4_0"] == 14


def test_a_plain_model(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "plain")
    byte_level().save_pretrained(tmp_path / "plain")
    refused(Checkpoint.open(str(tmp_path / "plain")), ModelError, "not quantized")


@pytest.mark.parametrize(
    ("quantizer", "cause"),
    [
        (RTN(8, 32, sym=False), "asymmetric at 8 bits"),
        (GPTQ.plain(4, 32, actorder=True), "follow the order of quantization"),
        (RTN(4, 16), "groups of 16 columns"),
    ],
    ids=str,
)
def test_settings_that_no_block_holds(checkpoint_of, quantizer, cause):
    refused(checkpoint_of("llama", quantizer), SettingError, cause)


def spaces_of_its_own():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def lower_case():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def something_around():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 1)]
    )
    return tokenizer


def endless():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    return tokenizer


def words():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="a", unk_token="<unk>")


def larger():
    tokenizer = byte_level()
    tokenizer.add_tokens([f"more{number}" for number in range(VOCAB)])
    return tokenizer


def other_spaces():
    tokenizer = sentence_pieces()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "_")
    return tokenizer


REFUSED_TOKENIZERS = [
    (zoo.tokenizer, "the pre-tokenizer null"),
    (lambda: byte_level(split=r"\w+|\s+"), "the pre-tokenizer"),
    (lambda: byte_level(split=QWEN_SPLIT, ignore_merges=True), "the pre-tokenizer"),
    (spaces_of_its_own, "the pre-tokenizer"),
    (lower_case, "the normalizer"),
    (something_around, "what the tokenizer sets around a text"),
    (endless, "no end token"),
    (words, "WordLevel"),
    (larger, r"the tokenizer has token \d+"),
    (other_spaces, "how the tokenizer treats spaces"),
    (lambda: sentence_pieces(lambda merges: merges.remove(("t", "h"))), r"without 't' \+ 'h'"),
    (lambda: sentence_pieces(lambda merges: merges.append(merges.pop(1))), "not together"),
]


@pytest.mark.parametrize(
    ("tokenizer", "cause"), REFUSED_TOKENIZERS, ids=[c for _, c in REFUSED_TOKENIZERS]
)
def test_tokenizers_that_llama_cpp_does_not_follow(copy, tokenizer, cause):
    refused(copy(tokenizer=tokenizer(), eos_token_id=None), ModelError, cause)


def test_a_checkpoint_without_a_tokenizer(copy):
    checkpoint = copy()
    for path in checkpoint.folder.glob("tokenizer*"):
        path.unlink()
    refused(checkpoint, ModelError, "no tokenizer")


@pytest.fixture
def checkpoint(copy) -> Checkpoint:
    return copy()


def with_tensors(checkpoint, change):
    path = checkpoint.folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
    return Checkpoint.open(str(checkpoint.folder))


def test_a_tensor_that_is_missing(checkpoint):
    missing = with_tensors(checkpoint, lambda state: state.pop("model.norm.weight"))
    refused(missing, ModelError, "lacks model.norm.weight")


def test_a_packed_layer_without_a_place(checkpoint):
    def change(state):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            state[f"model.more.{part}"] = state[f"model.layers.0.mlp.up_proj.{part}"].clone()

    refused(with_tensors(checkpoint, change), ModelError, "also has model.more.weight")


def test_what_no_layer_takes_is_left_out_and_named(copy, export):
    checkpoint = copy("llama3")
    bare = export(checkpoint)
    assert "left_out" not in bare.facts
    more = {
        "v_head.weight": torch.ones(1, 128),
        "mtp.fc.weight": torch.ones(128, 128),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.layers.0.mlp.up_proj.bias": torch.zeros(256),  # AutoGPTQ wrote such
    }
    made = export(with_tensors(checkpoint, lambda state: state.update(more)))
    assert made.facts["left_out"] == [
        "model.layers.0.mlp.up_proj.bias", "mtp.fc.weight", "v_head.weight"
    ]  # fmt: skip
    assert made.tensors.keys() == bare.tensors.keys()
    for name, tensor in made.tensors.items():
        assert np.array_equal(tensor.data, bare.tensors[name].data), name


def test_a_bias_that_llama_cpp_would_not_add_is_refused(copy):
    checkpoint = copy("llama3")
    name = "model.layers.0.mlp.up_proj.bias"
    more = with_tensors(checkpoint, lambda state: state.update({name: torch.ones(256)}))
    refused(more, ModelError, f"also has {name}")


@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_its_own_though_the_config_ties_it(copy, export, own):
    """transformers takes the file's where the two differ, and so do we."""
    checkpoint = copy("qwen2", tie_word_embeddings=True)
    embedding = dict(checkpoint.tensors())["model.embed_tokens.weight"]
    head = embedding + 1 if own else embedding.clone()
    checkpoint = with_tensors(checkpoint, lambda state: state.update({"lm_head.weight": head}))
    model = reader.load_checkpoint(checkpoint)
    assert torch.equal(model.lm_head.weight, head)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not own
    made = export(checkpoint)
    assert ("output.weight" in made.tensors) is own
    if own:
        assert torch.equal(values(made.tensors["output.weight"]), head.float())


def test_weights_of_another_config(copy):
    refused(
        copy("qwen2", intermediate_size=512), ModelError, r"is \[\d+, \d+\] where \[\d+, \d+\] fits"
    )


def test_targets_that_are_none(checkpoint, tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, cause in (
        ("folder.gguf", "is a folder"),
        ("out", "is a folder"),
        ("out/model.safetensors", "does not end in .gguf"),
        ("file/model.gguf", "is not a folder"),
    ):
        refused(checkpoint, OutputError, cause, force=True, name=name)


def test_an_existing_file_is_kept_without_force(checkpoint, tmp_path):
    target = tmp_path / "model.gguf"
    target.write_text("mine")
    refused(checkpoint, OutputError, "exists", name="model.gguf")
    assert target.read_text() == "mine"
    export_gguf(checkpoint, target, force=True)
    assert gguf.GGUFReader(target).tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out"]


def test_a_link_is_replaced_not_followed(checkpoint, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "mine")
    refused(checkpoint, OutputError, "exists", name="model.gguf")
    export_gguf(checkpoint, tmp_path / "model.gguf", force=True)
    assert (tmp_path / "mine").read_text() == "mine"
    assert gguf.GGUFReader(tmp_path / "model.gguf").tensors


def failing(monkeypatch, error, at=5):
    plain, calls = gguf.GGUFWriter.write_tensor_data, []

    def write(self, tensor):
        calls.append(tensor)
        if len(calls) == at:
            raise error
        plain(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write)


def test_a_file_that_somebody_makes_meanwhile(checkpoint, monkeypatch, tmp_path):
    plain, target = gguf.GGUFWriter.write_tensor_data, tmp_path / "model.gguf"

    def write(self, tensor):
        target.write_text("mine")
        plain(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write)
    with pytest.raises(OutputError, match="was made while"):
        export_gguf(checkpoint, target)
    assert target.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out"]


def test_two_exports_into_one_file(checkpoint, monkeypatch, tmp_path):
    plain, target, refused = gguf.GGUFWriter.write_tensor_data, tmp_path / "model.gguf", []

    def write(self, tensor):
        if not refused:
            with pytest.raises(OutputError, match="another run is writing") as caught:
                export_gguf(checkpoint, target, force=True)
            refused.append(caught)
        plain(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write)
    export_gguf(checkpoint, target)
    assert refused and gguf.GGUFReader(target).tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out"]


def test_what_a_dead_export_left_is_said(checkpoint, tmp_path):
    left, notices = tmp_path / ".model.gguf.partial", []
    left.mkdir()
    (left / "lock").write_text("")
    (left / "whole").write_text("half")
    export_gguf(checkpoint, tmp_path / "model.gguf", notice=notices.append)
    assert notices == [f"removed {left}, which a run that was cut off has left"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out"]


def test_a_disk_that_fills_up(checkpoint, monkeypatch):
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    refused(checkpoint, OutputError, "is full")


def test_a_disk_that_is_too_small(checkpoint, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1000))
    refused(checkpoint, OutputError, "and its disk has 1000")


def test_an_interrupt(checkpoint, monkeypatch, tmp_path):
    failing(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        export_gguf(checkpoint, tmp_path / "deep" / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_disk_that_keeps_something_else(checkpoint, monkeypatch):
    plain = gguf.GGUFWriter.write_tensor_data

    def write(self, tensor):
        plain(self, tensor ^ 1 if len(self.tensors[0]) == 3 else tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write)
    refused(checkpoint, OutputError, "reads back changed")
