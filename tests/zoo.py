"""A conformance table: tiny, randomly initialised language models, and the sites of their blocks.

Whatever walks through a model is tested against every row, so a new family is one more row. The
sites were read off each model's own forward, by hand; `test_zoo` checks them with plain hooks.

A site is the set of layers that read one input tensor: the same object, not an equal one. Sites
stand in the order of their first call, and the layers of a site in the order of theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import zoo_configs as configs
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

Site = tuple[str, ...]
Sites = tuple[Site, ...]


@dataclass(frozen=True)
class Row:
    """One tiny model and what should be found in it.

    `blocks` is the dotted name of the list of decoder layers in the model in memory. `sites` holds
    for every block, except those in `other_sites` (block index -> sites). `never_called` are linear
    layers of each block that a forward on token ids does not use.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    blocks: str
    sites: Sites
    other_sites: dict[int, Sites] = field(default_factory=dict)
    never_called: tuple[str, ...] = ()
    auto_class: str = "AutoModelForCausalLM"
    dtype: torch.dtype = torch.float32
    noisy_norms: bool = True  # False keeps every norm at its initial value, and so all norms alike

    def build(self) -> PreTrainedModel:
        return _build(self.config(), self.auto_class, self.dtype, self.noisy_norms)

    def sites_of(self, block: int) -> Sites:
        return self.other_sites.get(block, self.sites)


@dataclass(frozen=True)
class Refused:
    """One tiny model that cannot be quantized, and why, in a few words."""

    name: str
    config: Callable[[], PreTrainedConfig]
    reason: str
    auto_class: str = "AutoModelForCausalLM"

    def build(self) -> PreTrainedModel:
        return _build(self.config(), self.auto_class, torch.float32, noisy_norms=True)


def _build(
    config: PreTrainedConfig, auto_class: str, dtype: torch.dtype, noisy_norms: bool
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_config(config, dtype=dtype)
    _enliven(model, noisy_norms)
    return model.eval()


@torch.no_grad()
def _enliven(model: nn.Module, noisy_norms: bool) -> None:
    """Give every parameter values that matter.

    Default initialisations have a tiny spread, zero biases and norms that are all alike: the blocks
    then add next to nothing to the residual stream, and mistakes in them cannot be seen. Matrices
    get a spread of 1 / sqrt(inputs), which keeps the size of activations; vectors (biases, norms)
    get noise on top of their initial values.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(parameter: Tensor, spread: float) -> Tensor:
        return spread * torch.randn(parameter.shape, generator=generator)

    done: set[int] = set()  # tied weights are one parameter
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            if isinstance(module, nn.Embedding):
                parameter.copy_(noise(parameter, 0.3))
            elif parameter.ndim >= 2:
                inputs = parameter.shape[0] if isinstance(module, Conv1D) else parameter[0].numel()
                parameter.copy_(noise(parameter, inputs**-0.5))
            elif noisy_norms or "Norm" not in type(module).__name__:
                parameter.copy_(parameter + noise(parameter, 0.2))


def token_ids(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    """Random ordinary tokens, `[batch, length]`: three windows long, none special, no images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(configs.UNK + 1, configs.IMAGE, (batch, length), generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character, a few frequent pairs, and an unknown token."""
    from tokenizers import Tokenizer, decoders, models

    special = ["<pad>", "<s>", "</s>", "<unk>"]  # in the order of PAD, BOS, EOS and UNK
    characters = ["\n", "\t", *map(chr, range(32, 127))]
    pairs = [
        "th",
        "he",
        "in",
        "er",
        "an",
        "re",
        "on",
        "at",
        "en",
        "nd",
        "ti",
        "es",
        "or",
        "te",
        "of",
        "ed",
    ]
    vocabulary = {token: index for index, token in enumerate(special + characters + pairs)}
    assert len(vocabulary) <= configs.IMAGE
    merges = [(first, second) for first, second in pairs]
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    fast.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, clean_up_tokenization_spaces=False, **names
    )


def save(row: Row | Refused, folder: str | Path) -> Path:
    """Write the row's model and a tokenizer to `folder`, as a user's checkpoint would lie there."""
    row.build().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Path(folder)


# The shapes of blocks that several families share.

_QKV: Site = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED: Site = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA: Sites = (_QKV, ("self_attn.o_proj",), _GATED, ("mlp.down_proj",))
_LLAMA_PARALLEL: Sites = (_QKV + _GATED, ("self_attn.o_proj",), ("mlp.down_proj",))
_FUSED: Sites = (
    ("self_attn.qkv_proj",),
    ("self_attn.o_proj",),
    ("mlp.gate_up_proj",),
    ("mlp.down_proj",),
)
_GLM4: Sites = (_QKV, ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
_OPT: Sites = (_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",))
_GPT2: Sites = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
_GPTJ: Sites = (
    ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
    ("attn.out_proj",),
    ("mlp.fc_out",),
)
_GPT_NEO: Sites = (
    ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    ("attn.attention.out_proj",),
    ("mlp.c_fc",),
    ("mlp.c_proj",),
)
_NEOX: Sites = (
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
)
_BLOOM: Sites = (
    ("self_attention.query_key_value",),
    ("self_attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
)
_FALCON_PARALLEL: Sites = (
    ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
    ("self_attention.dense",),
    ("mlp.dense_4h_to_h",),
)
_STARCODER2: Sites = (_QKV, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
_MPT: Sites = (("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",))
_PHI: Sites = ((*_QKV, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",))
_NEMOTRON: Sites = (_QKV, ("self_attn.o_proj",), ("mlp.up_proj",), ("mlp.down_proj",))
_MINICPM3: Sites = (
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),
    *_LLAMA[1:],
)
_GEMMA4: Sites = (*_LLAMA, ("per_layer_input_gate",), ("per_layer_projection",))
_MLP: Sites = (("feed_forward.gate_proj", "feed_forward.up_proj"), ("feed_forward.down_proj",))
_MAMBA: Sites = (("mamba.in_proj",), ("mamba.out_proj",))
_FALCON_H1: Sites = (
    *_MAMBA,
    _QKV,
    ("self_attn.o_proj",),
    ("feed_forward.up_proj", "feed_forward.gate_proj"),
    ("feed_forward.down_proj",),
)
_GRANITE: Sites = (("shared_mlp.input_linear",), ("shared_mlp.output_linear",))
_GEMMA4_SHARED: Sites = (("self_attn.q_proj",), *_GEMMA4[1:])

ROWS: tuple[Row, ...] = (
    Row("opt", configs.opt, "model.decoder.layers", _OPT),
    Row("opt_350m", configs.opt_350m, "model.decoder.layers", _OPT),
    Row("bloom", configs.bloom, "transformer.h", _BLOOM),
    Row("gpt2", configs.gpt2, "transformer.h", _GPT2),
    Row(
        "gpt2_cross_attention",
        configs.gpt2_cross_attention,
        "transformer.h",
        _GPT2,
        never_called=("crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj"),
    ),
    Row("gpt_bigcode", configs.gpt_bigcode, "transformer.h", _GPT2),
    Row("gpt_neo", configs.gpt_neo, "transformer.h", _GPT_NEO),
    Row("gpt_neox", configs.gpt_neox, "gpt_neox.layers", _NEOX),
    # Two norms of one tensor give equal inputs here, and still two sites.
    Row("gpt_neox_equal_norms", configs.gpt_neox, "gpt_neox.layers", _NEOX, noisy_norms=False),
    Row("gpt_neox_serial", configs.gpt_neox_serial, "gpt_neox.layers", _NEOX),
    Row("gptj", configs.gptj, "transformer.h", _GPTJ),
    Row("falcon", configs.falcon, "transformer.h", _FALCON_PARALLEL),
    Row("falcon_new", configs.falcon_new, "transformer.h", _BLOOM),
    Row("falcon_new_one_norm", configs.falcon_new_one_norm, "transformer.h", _FALCON_PARALLEL),
    Row("falcon_rw", configs.falcon_rw, "transformer.h", _BLOOM),
    Row("llama", configs.llama, "model.layers", _LLAMA),
    Row("llama_bfloat16", configs.llama, "model.layers", _LLAMA, dtype=torch.bfloat16),
    Row("llama_biases", configs.llama_biases, "model.layers", _LLAMA),
    Row("llama_rope_scaling", configs.llama_rope_scaling, "model.layers", _LLAMA),
    Row("llama_tied", configs.llama_tied, "model.layers", _LLAMA),
    Row("mistral", configs.mistral, "model.layers", _LLAMA),
    Row("qwen2", configs.qwen2, "model.layers", _LLAMA),
    Row("qwen3", configs.qwen3, "model.layers", _LLAMA),
    Row("gemma2", configs.gemma2, "model.layers", _LLAMA),
    Row("gemma3_text", configs.gemma3_text, "model.layers", _LLAMA),
    Row(
        "gemma4_text",
        configs.gemma4_text,
        "model.layers",
        _GEMMA4,
        other_sites={2: _GEMMA4_SHARED, 3: _GEMMA4_SHARED},
    ),
    Row("phi3", configs.phi3, "model.layers", _FUSED),
    Row("cohere", configs.cohere, "model.layers", _LLAMA_PARALLEL),
    Row("cohere2", configs.cohere2, "model.layers", _LLAMA_PARALLEL),
    Row("starcoder2", configs.starcoder2, "model.layers", _STARCODER2),
    Row(
        "bamba",
        configs.bamba,
        "model.layers",
        (*_MAMBA, *_MLP),
        other_sites={1: (_QKV, ("self_attn.o_proj",), *_MLP)},
    ),
    Row("falcon_h1", configs.falcon_h1, "model.layers", _FALCON_H1),
    Row(
        "granite_hybrid",
        configs.granite_hybrid,
        "model.layers",
        (*_MAMBA, *_GRANITE),
        other_sites={1: (_QKV, ("self_attn.o_proj",), *_GRANITE)},
    ),
    Row("mpt", configs.mpt, "transformer.blocks", _MPT),
    Row("stablelm", configs.stablelm, "model.layers", _LLAMA),
    Row("stablelm_parallel", configs.stablelm_parallel, "model.layers", _LLAMA_PARALLEL),
    Row("phi", configs.phi, "model.layers", _PHI),
    Row("olmo2", configs.olmo2, "model.layers", _LLAMA),
    Row("olmo3", configs.olmo3, "model.layers", _LLAMA),
    Row("granite", configs.granite, "model.layers", _LLAMA),
    Row("smollm3", configs.smollm3, "model.layers", _LLAMA),
    Row("glm4", configs.glm4, "model.layers", _GLM4),
    Row("nemotron", configs.nemotron, "model.layers", _NEMOTRON),
    Row("minicpm3", configs.minicpm3, "model.layers", _MINICPM3),
)

_WITH_IMAGES = "AutoModelForImageTextToText"

MULTIMODAL: tuple[Row, ...] = (
    Row("llava", configs.llava, "model.language_model.layers", _LLAMA, auto_class=_WITH_IMAGES),
    Row(
        "qwen2_vl", configs.qwen2_vl, "model.language_model.layers", _LLAMA, auto_class=_WITH_IMAGES
    ),
    Row(
        "qwen2_5_vl",
        configs.qwen2_5_vl,
        "model.language_model.layers",
        _LLAMA,
        auto_class=_WITH_IMAGES,
    ),
    Row("gemma3", configs.gemma3, "model.language_model.layers", _LLAMA, auto_class=_WITH_IMAGES),
    Row("idefics3", configs.idefics3, "model.text_model.layers", _LLAMA, auto_class=_WITH_IMAGES),
)

REFUSED: tuple[Refused, ...] = (
    Refused("bert_masked", configs.bert, "encoder only", "AutoModelForMaskedLM"),
    Refused("bert", configs.bert, "encoder only", "AutoModel"),
    Refused("t5", configs.t5, "encoder and decoder", "AutoModelForSeq2SeqLM"),
    Refused("dbrx", configs.dbrx, "experts in one matrix"),
    Refused("rwkv", configs.rwkv, "recurrent"),
    Refused("llama_no_blocks", configs.llama_no_blocks, "no blocks"),
)


def without_tokens(model):
    """A Mixtral of four experts of which the last one gets no token."""
    with torch.no_grad():  # one feature is 5 for every token, and speaks against expert 3
        model.model.embed_tokens.weight[:, 0] = 5
        for block in model.model.layers:
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.experts.down_proj[:, 0] = 0
            block.post_attention_layernorm.weight[0] = 1
            block.mlp.gate.weight[:, 0] = torch.tensor([0.0, 0, 0, -100])
    return model
