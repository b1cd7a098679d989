"""Tiny configs of mlx-lm's families; the sizes are small, and windows smaller than the prompts."""

import pytest
from checkpoints import HIDDEN, VOCAB, gemma4

LAYERS = 4

PLAIN = {
    "attention_bias": False,
    "head_dim": 8,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
WINDOWS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "yarn",
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
ROUTED = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.5,
    "topk_group": 1,
}
MUP = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}


def family(model_type, **changes):
    config = PLAIN | {"model_type": model_type} | changes
    return {key: value for key, value in config.items() if value is not ...}


def endless(config):
    """Without a stop token: every answer has its full length."""
    return {key: value for key, value in config.items() if key != "eos_token_id"}


# Families whose tokens are mlx-lm's own, with a drafter and without.
RIGHT = {
    "llama": family("llama", rope_scaling=LLAMA3_ROPE),
    "llama, tied, with windows": family(
        "llama", tie_word_embeddings=True, layer_types=WINDOWS, sliding_window=8
    ),
    "mistral": family("mistral"),
    "ministral3": family(
        "ministral3",
        layer_types=WINDOWS,
        sliding_window=8,
        rope_parameters={
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
            "rope_theta": 1e4,
            "rope_type": "default",
        },
    ),
    "mistral3": {"model_type": "mistral3", "text_config": family("llama")},
    "qwen2": family("qwen2"),
    "qwen2_moe": family("qwen2_moe", shared_expert_intermediate_size=24, **EXPERTS),
    "qwen3": family("qwen3"),
    "qwen3_moe": family(
        "qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, **EXPERTS
    ),
    "gemma": family("gemma", tie_word_embeddings=True),
    "gemma2": family("gemma2", query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
    "gemma3_text": family(
        "gemma3_text", sliding_window=8, sliding_window_pattern=2, query_pre_attn_scalar=8
    ),
    "gemma4_text": endless(gemma4(LAYERS)),
    "gemma4_text, with shared keys": endless(gemma4(LAYERS, num_kv_shared_layers=1)),
    "phi": family("phi", partial_rotary_factor=0.5, num_key_value_heads=4),
    "phi3": family("phi3"),
    "phimoe": family(
        "phimoe",
        num_local_experts=4,
        rope_scaling={
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "long_mscale": 1.2,
            "short_factor": [1.0] * 4,
            "short_mscale": 1.1,
        },
    ),
    "olmo2": family("olmo2"),
    "olmo3": family("olmo3", layer_types=WINDOWS, sliding_window=8),
    "olmoe": family("olmoe", **EXPERTS),
    "smollm3": family("smollm3", no_rope_layer_interval=2),
    "granite": family("granite", **MUP),
    "granitemoe": family("granitemoe", num_local_experts=4, num_experts_per_tok=2, **MUP),
    "glm": family("glm"),
    "glm4": family("glm4", partial_rotary_factor=0.5),
    "glm4_moe": family("glm4_moe", partial_rotary_factor=0.5, use_qk_norm=True, rope_scaling=None)
    | ROUTED,
    "glm4_moe_lite": family("glm4_moe_lite", rope_scaling=None) | ROUTED | LATENT,
    "cohere": family("cohere", use_qk_norm=True, num_key_value_heads=2),
    "cohere2": family("cohere2", sliding_window=8, sliding_window_pattern=2),
    "starcoder2": family("starcoder2", tie_word_embeddings=True),
    "mixtral": family("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": family(
        "gpt_oss", num_local_experts=4, sliding_window=8, layer_types=WINDOWS, rope_scaling=YARN
    ),
    "deepseek_v2": family(
        "deepseek_v2", topk_method="group_limited_greedy", rope_scaling=YARN | {"type": "yarn"}
    )
    | ROUTED
    | LATENT,
    "deepseek_v3": family("deepseek_v3", rope_scaling=None) | ROUTED | LATENT,
    "minicpm": family("minicpm", dim_model_base=16, scale_depth=1.4, scale_emb=3.0),
    "minicpm3": family(
        "minicpm3",
        dim_model_base=16,
        scale_depth=1.4,
        scale_emb=3.0,
        rope_scaling={
            "long_factor": [1.0, 2.0],
            "short_factor": [1.0] * 2,
            "original_max_position_embeddings": 64,
        },
    )
    | LATENT
    | {"num_key_value_heads": 4},
    "stablelm": family(
        "stablelm", layer_norm_eps=1e-5, use_qkv_bias=True, partial_rotary_factor=0.5
    ),
    "exaone4": family(
        "exaone4", sliding_window=8, sliding_window_pattern="LG", rope_scaling=LLAMA3_ROPE
    ),
    "seed_oss": family("seed_oss"),
    "ernie4_5": family("ernie4_5", use_bias=False),
    "helium": family("helium"),
    "nemotron": family("nemotron", hidden_act="relu2", norm_eps=1e-5),
    "hunyuan_v1_dense": family("hunyuan_v1_dense"),
    "internlm2": family("internlm2", bias=False),
    "mimo": family("mimo"),
    "apertus": family("apertus", post_norm=False, qk_norm=True),
    "gpt2": family(
        "gpt2",
        n_ctx=512,
        n_embd=HIDDEN,
        n_head=4,
        n_layer=LAYERS,
        n_positions=512,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=...,
    ),
    "seed_oss, tied": family("seed_oss", tie_word_embeddings=True),
    "dots1": family("dots1") | ROUTED,
    "gpt_neox": family(
        "gpt_neox",
        layer_norm_eps=1e-5,
        num_key_value_heads=4,
        rotary_emb_base=10000,
        rotary_pct=0.5,
    ),
    "gptj": family("gptj", n_embd=HIDDEN, n_head=4, n_layer=LAYERS, n_positions=512, rotary_dim=4),
    "qwen": family("qwen", kv_channels=8, num_key_value_heads=4),
    "internlm3": family("internlm3"),
    "minimax": family(
        "minimax",
        num_experts_per_tok=2,
        num_local_experts=4,
        rotary_dim=4,
        shared_intermediate_size=24,
    ),
    "bailing_moe": family(
        "bailing_moe", first_k_dense_replace=1, norm_topk_prob=True, num_shared_experts=1
    )
    | EXPERTS,
    "ernie4_5_moe": family(
        "ernie4_5_moe",
        moe_intermediate_size=24,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        use_bias=False,
    ),
    "exaone": family("exaone", num_layers=LAYERS, layer_norm_epsilon=1e-5),
    "exaone_moe": family(
        "exaone_moe",
        is_moe_layer=[False, True, True, True],
        layer_types=WINDOWS,
        num_shared_experts=1,
        sliding_window=8,
        n_group=2,
    )
    | EXPERTS,
    "nanochat": family("nanochat", num_key_value_heads=4),
    "plamo": family("plamo", n_shared_head=2),
    "llama4_text": family(
        "llama4_text", intermediate_size_mlp=48, no_rope_layers=[1, 0, 1, 1], use_qk_norm=True
    ),
    "llama4_text, tied": family(
        "llama4_text",
        intermediate_size_mlp=48,
        no_rope_layers=[1, 0, 1, 1],
        use_qk_norm=True,
        tie_word_embeddings=True,
    ),
    "mimo_v2_flash": family(
        "mimo_v2_flash",
        add_full_attention_sink_bias=False,
        add_swa_attention_sink_bias=True,
        hybrid_layer_pattern=[0, 1, 0, 1],
        layernorm_epsilon=1e-6,
        moe_layer_freq=[0, 1, 1, 1],
        partial_rotary_factor=0.5,
        scoring_func="sigmoid",
        sliding_window_size=8,
        swa_head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_rope_theta=1e4,
        swa_v_head_dim=8,
        topk_method="noaux_tc",
        v_head_dim=8,
    )
    | ROUTED
    | {"n_shared_experts": None, "num_key_value_heads": 2},
}

CONV = {"conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
GATED_DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
}
# The same for families with recurrent layers.
RECURRENT = {
    "qwen3_5": family("qwen3_5", full_attention_interval=2) | GATED_DELTA,
    "qwen3_5_moe": family(
        "qwen3_5_moe",
        full_attention_interval=4,
        shared_expert_intermediate_size=24,
        tie_word_embeddings=True,
    )
    | GATED_DELTA
    | EXPERTS,
    "mamba2": family(
        "mamba2",
        head_dim=8,
        layer_norm_epsilon=1e-5,
        n_groups=1,
        num_heads=8,
        state_size=8,
        time_step_limit=[0.0, 100.0],
    )
    | CONV,
    "qwen3_next": family(
        "qwen3_next",
        decoder_sparse_step=1,
        mlp_only_layers=[],
        partial_rotary_factor=0.5,
        shared_expert_intermediate_size=24,
    )
    | GATED_DELTA
    | EXPERTS,
    "granitemoehybrid": family(
        "granitemoehybrid",
        layer_types=["mamba", "attention"] * 2,
        mamba_chunk_size=16,
        mamba_conv_bias=True,
        mamba_d_conv=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_expand=2,
        mamba_n_groups=1,
        mamba_n_heads=8,
        mamba_proj_bias=False,
        position_embedding_type="rope",
        shared_intermediate_size=24,
        time_step_limit=[0.0, 100.0],
    )
    | MUP,
    "lfm2": family(
        "lfm2",
        block_auto_adjust_ff_dim=False,
        block_dim=HIDDEN,
        block_ffn_dim_multiplier=1.0,
        block_multiple_of=8,
        conv_L_cache=3,
        conv_bias=False,
        full_attn_idxs=[1, 3],
        norm_eps=1e-6,
    ),
    "falcon_h1": family("falcon_h1", mamba_d_head=8, mamba_d_ssm=64, mamba_d_state=8)
    | {"mamba_n_heads": 8, "mamba_chunk_size": 16},
    "nemotron_h": family(
        "nemotron_h",
        attention_bias=False,
        conv_kernel=4,
        hybrid_override_pattern=["M", "*", "M", "-"],
        layer_norm_epsilon=1e-5,
        mamba_head_dim=8,
        mamba_num_heads=8,
        mamba_proj_bias=False,
        n_groups=2,
        ssm_state_size=8,
        time_step_limit=[0.0, 100.0],
        use_bias=False,
        use_conv_bias=True,
    ),
}

RIGHT |= RECURRENT

# Right without a drafter; nothing can read its layers for one.
UNTAPPED = {
    "iquestloopcoder": family("iquestloopcoder", loop_window_size=8),
}

# Refused when a run begins, since only their passes show it.
REFUSED_BY_RUNNING = {
    "mistral4": family(
        "mistral4",
        rope_parameters=YARN
        | {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "mscale_all_dim": 1.0},
    )
    | ROUTED
    | LATENT,
    "gpt_bigcode": family("gpt_bigcode", n_embd=HIDDEN, n_head=4, n_inner=48, n_layer=LAYERS)
    | {"n_positions": 512, "layer_norm_epsilon": 1e-5, "num_key_value_heads": 1},
}

# Refused by a run and by `check`, which reads no weights.
REFUSED = {
    "mamba": family("mamba", state_size=8, max_position_embeddings=...) | CONV,
    "jamba": family(
        "jamba",
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=8,
        mamba_expand=2,
    )
    | EXPERTS,
    "recurrent_gemma": family(
        "recurrent_gemma",
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        conv1d_width=4,
        logits_soft_cap=30.0,
    ),
    "rwkv7": family("rwkv7", norm_eps=1e-5)
    | {f"{name}_low_rank_dim": 4 for name in ("a", "v", "gate", "decay")},
    "llama4": {
        "model_type": "llama4",
        "text_config": family(
            "llama4_text",
            attention_chunk_size=8,
            interleave_moe_layer_step=1,
            intermediate_size_mlp=48,
            num_experts_per_tok=1,
            no_rope_layers=[1, 0, 1, 1],
            num_local_experts=4,
            rope_scaling=None,
            use_qk_norm=True,
        ),
    },
    "deepseek_v32": family("deepseek_v32", index_head_dim=8, index_n_heads=2, index_topk=8)
    | ROUTED
    | LATENT,
    "longcat_flash": family(
        "longcat_flash",
        attention_method="MLA",
        expert_ffn_hidden_size=24,
        ffn_hidden_size=48,
        mla_scale_kv_lora=True,
        mla_scale_q_lora=True,
        moe_topk=2,
        num_layers=LAYERS,
        zero_expert_num=2,
        zero_expert_type="identity",
    )
    | ROUTED
    | LATENT,
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": family(
            "gemma3n",
            activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
            altup_active_idx=0,
            altup_coef_clip=120.0,
            altup_correct_scale=True,
            altup_num_inputs=2,
            final_logit_softcapping=30.0,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            layer_types=WINDOWS,
            num_kv_shared_layers=2,
            rope_local_base_freq=1e4,
            sliding_window=8,
            vocab_size_per_layer_input=VOCAB,
        ),
    },
}


# One of each kind of layer; the others run with the slow tests.
OFTEN = {
    *("llama, tied, with windows", "qwen3_moe", "gemma2", "gemma4_text, with shared keys", "gpt2"),
    *("gpt_oss", "deepseek_v3", "minicpm3", "cohere2", "phimoe", "llama4_text", "seed_oss, tied"),
    *("qwen3_5_moe", "mamba2", "granitemoehybrid", "lfm2", "falcon_h1", "nemotron_h"),
}


def often(names):
    """List names for `parametrize`; those that are not in OFTEN are slow."""
    return [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in names]
