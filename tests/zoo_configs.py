"""Configurations of tiny language models, one function per row of the tables in `zoo`.

All are 64 wide (128 in the feed-forward part), with a vocabulary of 128 and two to four blocks, and
every width of a linear layer is a multiple of 32, so that each can be packed at 2, 3, 4 and 8 bits.

Sliding windows hold `WINDOW` tokens, fewer than the sequences of `zoo.token_ids`; where a family
allows it, some blocks see the whole sequence and others only the window.
"""

import transformers as tf
from transformers import PreTrainedConfig

VOCAB = 128
WINDOW = 8
PAD, BOS, EOS, UNK = range(4)
IMAGE, VIDEO, VISION_START, VISION_END = range(
    124, 128
)  # never sampled, never produced by the tokenizer

FULL, SLIDING = "full_attention", "sliding_attention"

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
_COMMON = _TOKENS | _HEADS | _SHAPE
_GPT = _TOKENS | {"n_embd": 64, "n_inner": 128, "n_head": 4, "n_layer": 2, "n_positions": 64}


def llama(**changes) -> PreTrainedConfig:
    return tf.LlamaConfig(**_COMMON | {"num_hidden_layers": 3} | changes)


def llama_biases() -> PreTrainedConfig:
    return llama(attention_bias=True, mlp_bias=True)


def llama_tied() -> PreTrainedConfig:
    return llama(tie_word_embeddings=True)


def llama_rope_scaling() -> PreTrainedConfig:
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
    return llama(
        rope_parameters=scaling | {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    )


def mistral() -> PreTrainedConfig:
    return tf.MistralConfig(**_COMMON, num_hidden_layers=2, head_dim=32, sliding_window=WINDOW)


def qwen2() -> PreTrainedConfig:
    return tf.Qwen2Config(
        **_COMMON,
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
    )


def qwen3() -> PreTrainedConfig:
    return tf.Qwen3Config(
        **_COMMON,
        num_hidden_layers=3,
        head_dim=32,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=[FULL, SLIDING, FULL],
    )


def _gemma(**changes) -> dict:
    heads = {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": WINDOW,
        "num_hidden_layers": 3,
    }
    return _COMMON | heads | {"layer_types": [SLIDING, FULL, SLIDING]} | changes


def gemma2() -> PreTrainedConfig:
    return tf.Gemma2Config(**_gemma())


def gemma3_text() -> PreTrainedConfig:
    return tf.Gemma3TextConfig(**_gemma())


def gemma4_text() -> PreTrainedConfig:
    """The last two blocks have no k_proj and v_proj: they read those of earlier blocks."""
    config = _gemma(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=[SLIDING, FULL] * 2)
    del config["query_pre_attn_scalar"]
    return tf.Gemma4TextConfig(
        **config,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=32,
        global_head_dim=32,
    )


def phi3() -> PreTrainedConfig:
    return tf.Phi3Config(**_COMMON, num_hidden_layers=2, sliding_window=WINDOW)


def cohere() -> PreTrainedConfig:
    return tf.CohereConfig(**_COMMON, num_hidden_layers=2, logit_scale=0.5, use_qk_norm=True)


def cohere2() -> PreTrainedConfig:
    return tf.Cohere2Config(
        **_COMMON,
        num_hidden_layers=3,
        logit_scale=0.5,
        sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, FULL],
    )


def starcoder2() -> PreTrainedConfig:
    return tf.Starcoder2Config(**_COMMON, num_hidden_layers=2, sliding_window=WINDOW)


def stablelm() -> PreTrainedConfig:
    return tf.StableLmConfig(**_COMMON, num_hidden_layers=2, use_qkv_bias=True)


def stablelm_parallel() -> PreTrainedConfig:
    return tf.StableLmConfig(
        **_COMMON, num_hidden_layers=2, use_parallel_residual=True, qk_layernorm=True
    )


def phi() -> PreTrainedConfig:
    return tf.PhiConfig(**_COMMON, num_hidden_layers=2)


def olmo2() -> PreTrainedConfig:
    return tf.Olmo2Config(**_COMMON, num_hidden_layers=2)


def olmo3() -> PreTrainedConfig:
    return tf.Olmo3Config(
        **_COMMON, num_hidden_layers=3, sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, FULL]
    )


def granite() -> PreTrainedConfig:
    return tf.GraniteConfig(
        **_COMMON,
        num_hidden_layers=2,
        attention_multiplier=0.25,
        embedding_multiplier=6.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    )


def smollm3() -> PreTrainedConfig:
    """Blocks without rotary embeddings, which are also the sliding ones."""
    return tf.SmolLM3Config(
        **_COMMON,
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=WINDOW,
        no_rope_layer_interval=2,
    )


def glm4() -> PreTrainedConfig:
    return tf.Glm4Config(**_COMMON, num_hidden_layers=2, head_dim=16)


def nemotron() -> PreTrainedConfig:
    return tf.NemotronConfig(**_COMMON, num_hidden_layers=2)


def minicpm3() -> PreTrainedConfig:
    """Attention through low-rank latents."""
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32}
    return tf.MiniCPM3Config(
        **_COMMON | {"num_key_value_heads": 4},
        **ranks,
        num_hidden_layers=2,
        v_head_dim=16,
        scale_emb=6,
        dim_model_base=32,
    )


def opt() -> PreTrainedConfig:
    shape = {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
    return tf.OPTConfig(**_TOKENS, **shape, max_position_embeddings=64)


def opt_350m() -> PreTrainedConfig:
    """Norms after the sums, and embeddings narrower than the blocks, like facebook/opt-350m."""
    config = opt()
    config.do_layer_norm_before, config.word_embed_proj_dim = False, 32
    return config


def bloom() -> PreTrainedConfig:
    return tf.BloomConfig(**_TOKENS, hidden_size=64, n_layer=2, n_head=4)


def gpt2() -> PreTrainedConfig:
    return tf.GPT2Config(**_GPT)


def gpt2_cross_attention() -> PreTrainedConfig:
    """Cross-attention that nothing calls when the model runs as a plain language model."""
    return tf.GPT2Config(**_GPT, add_cross_attention=True)


def gpt_bigcode() -> PreTrainedConfig:
    return tf.GPTBigCodeConfig(**_GPT, multi_query=True)


def gptj() -> PreTrainedConfig:
    return tf.GPTJConfig(**_GPT, rotary_dim=8)


def gpt_neo() -> PreTrainedConfig:
    local = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
    return tf.GPTNeoConfig(**_TOKENS, **_SHAPE, **local, num_heads=4)


def gpt_neox(parallel: bool = True) -> PreTrainedConfig:
    return tf.GPTNeoXConfig(
        **_TOKENS,
        **_SHAPE,
        num_attention_heads=4,
        num_hidden_layers=3,
        use_parallel_residual=parallel,
    )


def gpt_neox_serial() -> PreTrainedConfig:
    return gpt_neox(parallel=False)


def _falcon(**changes) -> PreTrainedConfig:
    shape = {
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    return tf.FalconConfig(**_TOKENS | shape | {"max_position_embeddings": 64} | changes)


def falcon() -> PreTrainedConfig:
    """Falcon 7B: one key and value head; attention and feed-forward in parallel behind one norm."""
    return _falcon()


def falcon_new() -> PreTrainedConfig:
    """Falcon 40B: grouped heads; attention and feed-forward in parallel behind a norm each."""
    return _falcon(new_decoder_architecture=True, num_kv_heads=2)


def falcon_new_one_norm() -> PreTrainedConfig:
    """Falcon 2 11B: as the 40B, with one norm."""
    return _falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)


def falcon_rw() -> PreTrainedConfig:
    """Falcon RW: serial, alibi, biases."""
    return _falcon(parallel_attn=False, multi_query=False, alibi=True, bias=True)


def mpt() -> PreTrainedConfig:
    return tf.MptConfig(
        **_TOKENS, d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64
    )


# Language models inside wrappers that also take images.

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llava() -> PreTrainedConfig:
    """A vision tower deeper than the language model."""
    vision = tf.CLIPVisionConfig(**_VISION | {"num_hidden_layers": 5}, image_size=16, patch_size=8)
    return tf.LlavaConfig(
        vision_config=vision, text_config=llama(), image_token_index=IMAGE, image_seq_length=4
    )


def _qwen_vl(config_class, vision: dict) -> PreTrainedConfig:
    # Three rotary sections (time, height, width) share the eight frequencies of a head.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    marks = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    return config_class(
        text_config=_COMMON | {"num_hidden_layers": 3, "rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 8} | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **marks,
    )


def qwen2_vl() -> PreTrainedConfig:
    return _qwen_vl(tf.Qwen2VLConfig, {"embed_dim": 32, "hidden_size": 64})


def qwen2_5_vl() -> PreTrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    return _qwen_vl(tf.Qwen2_5_VLConfig, vision)


def gemma3() -> PreTrainedConfig:
    vision = tf.SiglipVisionConfig(**_VISION, image_size=32, patch_size=8, vision_use_head=False)
    marks = {
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
        "image_token_index": IMAGE,
    }
    return tf.Gemma3Config(
        text_config=gemma3_text(), vision_config=vision, mm_tokens_per_image=4, **marks
    )


def idefics3() -> PreTrainedConfig:
    vision = tf.models.idefics3.Idefics3VisionConfig(**_VISION, image_size=32, patch_size=8)
    return tf.Idefics3Config(
        vision_config=vision,
        text_config=llama(),
        image_token_id=IMAGE,
        pad_token_id=PAD,
        scale_factor=2,
    )


# Models that must be refused.


def llama_no_blocks() -> PreTrainedConfig:
    return llama(num_hidden_layers=0)


def bert() -> PreTrainedConfig:
    return tf.BertConfig(vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=4, **_SHAPE)


def t5() -> PreTrainedConfig:
    return tf.T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)


def rwkv() -> PreTrainedConfig:
    return tf.RwkvConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        context_length=64,
    )


# Sparse experts: 4 to a block, 2 chosen.

_EXPERTS = {"moe_intermediate_size": 96, "num_experts_per_tok": 2}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LOCAL = {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}


def _sparse(name: str, blocks: int = 2, **changes) -> PreTrainedConfig:
    return getattr(tf, name)(**_COMMON | {"num_hidden_layers": blocks} | changes)


def mixtral() -> PreTrainedConfig:
    return _sparse("MixtralConfig", **_LOCAL)


def qwen2_moe() -> PreTrainedConfig:
    return _sparse("Qwen2MoeConfig", **_EXPERTS, shared_expert_intermediate_size=64, num_experts=4)


def qwen3_moe() -> PreTrainedConfig:
    return _sparse("Qwen3MoeConfig", **_EXPERTS, num_experts=4, head_dim=16)


def olmoe() -> PreTrainedConfig:
    return _sparse("OlmoeConfig", intermediate_size=96, num_experts=4, num_experts_per_tok=2)


def deepseek_v3() -> PreTrainedConfig:
    latent = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16}
    latent |= {"qk_nope_head_dim": 16, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1}
    return _sparse("DeepseekV3Config", **_ROUTED, **latent)


def gpt_oss() -> PreTrainedConfig:
    return _sparse("GptOssConfig", **_LOCAL, head_dim=16)


def granite_moe() -> PreTrainedConfig:
    return _sparse("GraniteMoeConfig", **_LOCAL)


def phimoe() -> PreTrainedConfig:
    return _sparse("PhimoeConfig", **_LOCAL)


def jamba() -> PreTrainedConfig:
    mamba = {
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 32,
        "use_mamba_kernels": False,
    }
    layers = {"attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_offset": 1}
    return _sparse("JambaConfig", **experts, **layers, **mamba)


def ernie_moe() -> PreTrainedConfig:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    experts |= {"moe_intermediate_size": 96, "moe_layer_start_index": 1}
    return _sparse("Ernie4_5_MoeConfig", **experts)


def glm4_moe() -> PreTrainedConfig:
    return _sparse("Glm4MoeConfig", **_ROUTED, n_group=1, topk_group=1, head_dim=16)


def nemotron_h() -> PreTrainedConfig:
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 30, "n_groups": 1}
    experts = _EXPERTS | {"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 96}
    return _sparse(
        "NemotronHConfig",
        3,
        layers_block_type=["mamba", "moe", "attention"],
        **(mamba | experts | {"n_group": 1, "topk_group": 1, "conv_kernel": 4, "head_dim": 16}),
        use_mamba_kernels=False,
    )


def qwen3_next() -> PreTrainedConfig:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    linear |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", FULL]}
    experts = _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64}
    return _sparse("Qwen3NextConfig", **experts, **linear, head_dim=16)


def qwen3_5_moe() -> PreTrainedConfig:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    linear |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", FULL]}
    experts = _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64}
    shape = {name: value for name, value in _COMMON.items() if name != "intermediate_size"}
    return tf.Qwen3_5MoeTextConfig(**shape, **experts, **linear, head_dim=16, num_hidden_layers=2)


def llama4(chosen: int = 1) -> PreTrainedConfig:
    experts = {"intermediate_size_mlp": 128, "num_local_experts": 4, "intermediate_size": 96}
    return _sparse("Llama4TextConfig", **experts, num_experts_per_tok=chosen, head_dim=16)


def dbrx() -> PreTrainedConfig:
    experts = {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    heads = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    return tf.DbrxConfig(**_TOKENS, **shape, attn_config=heads, ffn_config=experts)


# Mamba blocks beside attention: one parallel to it, two in its place.

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 30, "mamba_chunk_size": 8}


def bamba() -> PreTrainedConfig:
    return _sparse("BambaConfig", **_MAMBA, attn_layer_indices=[1])


def falcon_h1() -> PreTrainedConfig:
    return _sparse("FalconH1Config", **_MAMBA, mamba_d_ssm=128)


def granite_hybrid(experts: int = 0) -> PreTrainedConfig:
    chosen = {"num_local_experts": experts, "num_experts_per_tok": min(experts, 2)}
    chosen |= {"intermediate_size": 96, "shared_intermediate_size": 96}
    return _sparse("GraniteMoeHybridConfig", **chosen, **_MAMBA, layer_types=["mamba", "attention"])


def granite_hybrid_moe() -> PreTrainedConfig:
    return granite_hybrid(4)
