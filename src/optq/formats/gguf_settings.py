"""What llama.cpp computes with, and which models it would not compute as transformers does.

The facts are those of llama.cpp's ``src/models`` and of its converter: which of an architecture's
numbers are read from the file, and what is taken for granted.
"""

from __future__ import annotations

from typing import Any

import gguf
from gguf import MODEL_ARCH

from optq.errors import ModelError

FAMILIES = {  # by the model_type of config.json
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen2_moe": MODEL_ARCH.QWEN2MOE,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "olmoe": MODEL_ARCH.OLMOE,
}
RECURRENT = "llama.cpp keeps recurrent layers in a form of its own"
REASONS = {  # by a key of config.json that only such models have
    "kv_lora_rank": "llama.cpp keeps a matrix of latent attention transposed, across its groups",
    "mamba_d_state": RECURRENT,
    "ssm_state_size": RECURRENT,
    "linear_conv_kernel_dim": RECURRENT,
    "input_jitter_noise": "llama.cpp weighs the experts it chose by another rule",
}
ELSEWHERE = "run the checkpoint with optq, transformers or vLLM instead"
HEADS_AS_WIDE = (MODEL_ARCH.QWEN2, MODEL_ARCH.QWEN2MOE, MODEL_ARCH.OLMOE)
UNBIASED = (MODEL_ARCH.QWEN3, MODEL_ARCH.QWEN3MOE, MODEL_ARCH.OLMOE)
OWN_HEAD = (MODEL_ARCH.QWEN2MOE, MODEL_ARCH.OLMOE)
SUM_TO_ONE = (MODEL_ARCH.LLAMA, MODEL_ARCH.QWEN3MOE)  # the weights of the experts of a token


def architecture(config: dict[str, Any]) -> MODEL_ARCH:
    """llama.cpp's architecture for a ``config.json``. Raises :class:`ModelError` for others."""
    kind = config.get("model_type")
    if kind in FAMILIES:
        return FAMILIES[kind]
    other = "nobody has compared what llama.cpp computes for it"
    inside = {**config, **config.get("text_config", {})}
    reason = next((reason for key, reason in REASONS.items() if key in inside), other)
    raise ModelError(
        f"a {kind} model cannot be exported to llama.cpp: {reason}",
        f"{ELSEWHERE}; exported are {', '.join(FAMILIES)}",
    )


def add_settings(writer: gguf.GGUFWriter, config: Any, arch: MODEL_ARCH, sparse: int) -> None:
    """What llama.cpp computes with; ``sparse`` is the number of blocks that have experts.

    Raises :class:`ModelError` for what it computes otherwise.
    """
    _refuse(config, arch, sparse)
    rope = config.rope_parameters
    writer.add_type("model")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if sparse:
        writer.add_expert_count(_experts(config))
        writer.add_expert_used_count(config.num_experts_per_tok)
        if width := getattr(config, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(width)
        if width := getattr(config, "shared_expert_intermediate_size", None):
            writer.add_expert_shared_feed_forward_length(width)


def head_dim(config: Any) -> int:
    """The width of one head of the attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _experts(config: Any) -> int:
    return getattr(config, "num_local_experts", None) or config.num_experts


def _refuse(config: Any, arch: MODEL_ARCH, sparse: int) -> None:
    rope, longest = config.rope_parameters, config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = {*(getattr(config, "layer_types", None) or ())}
    local = kinds - {"full_attention"} or (not kinds and window is not None)
    scalings = {"default", "linear"} | ({"llama3"} if arch == MODEL_ARCH.LLAMA else set())
    heads, clip = config.num_attention_heads, getattr(config, "clip_qkv", None)
    wide = arch in HEADS_AS_WIDE and head_dim(config) * heads != config.hidden_size
    shared = arch == MODEL_ARCH.OLMOE and config.num_key_value_heads != heads
    tied = arch in OWN_HEAD and config.tie_word_embeddings
    sum_to_one = getattr(config, "norm_topk_prob", True)
    for refused, reason in (
        (config.hidden_act != "silu", f"the activation {config.hidden_act}"),
        (local and (window or 0) < longest, f"attention to the last {window} tokens only"),
        (rope["rope_type"] not in scalings, f"rotary scaling of the kind {rope['rope_type']}"),
        (rope.get("partial_rotary_factor", 1) != 1, "rotary embeddings of a part of each head"),
        (wide, "heads that are not as wide together as the model"),
        (shared, "keys and values that several heads share"),
        (arch in UNBIASED and config.attention_bias, "biases in the attention"),
        (clip is not None, f"queries, keys and values clipped to {clip}"),
        (tied, "a head that is the embedding"),
        (sparse not in (0, config.num_hidden_layers), "blocks without experts among the others"),
        (sparse and _experts(config) == 1, "a single expert"),
        (
            sparse and sum_to_one != (arch in SUM_TO_ONE),
            f"experts' weights that {'' if sum_to_one else 'do not '}sum to one (norm_topk_prob)",
        ),
    ):
        if refused:
            raise ModelError(
                f"llama.cpp does not compute {reason} for a {config.model_type} model", ELSEWHERE
            )
