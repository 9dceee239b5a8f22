"""The shapes of small random checkpoints: one per routing method and tensor layout, and two to measure."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A family of transformers and the fields of its config.json."""

    family: str  # transformers has <family>Config and <family>ForCausalLM
    fields: Mapping[str, object]


# The rope of the models that this product is for; also the one that vLLM computes right on a CPU in eager mode.
_YARN: Mapping[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_COMMON: Mapping[str, object] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
_LATENT: Mapping[str, object] = {
    **_COMMON,
    # Rank 512 with 64 rope dimensions is the only latent layout that vLLM's CPU backend has.
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_parameters": _YARN,
}
PRESETS: Mapping[str, Preset] = {
    "nano": Preset(family="DeepseekV2", fields=_LATENT),
    "v2-lite": Preset(
        family="DeepseekV2",
        fields={**_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    ),
    "v3": Preset(
        family="DeepseekV3",
        fields={
            **_LATENT,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 0,
        },
    ),
    "qwen3-moe": Preset(
        family="Qwen3Moe",
        fields={
            **_COMMON,
            "head_dim": 64,
            "num_key_value_heads": 2,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "mixtral": Preset(
        family="Mixtral",
        fields={
            **{key: value for key, value in _COMMON.items() if key != "moe_intermediate_size"},
            "intermediate_size": 128,
            "head_dim": 64,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
    "bench-300m": Preset(
        family="DeepseekV2",
        fields={
            **_LATENT,
            "vocab_size": 4096,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "moe_intermediate_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "n_routed_experts": 64,
            "q_lora_rank": 256,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
    ),
    "bench-1b": Preset(
        family="DeepseekV2",
        fields={
            **_LATENT,
            "vocab_size": 4096,
            "hidden_size": 1536,
            "intermediate_size": 3072,
            "moe_intermediate_size": 256,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "n_routed_experts": 64,
            "q_lora_rank": 384,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
    ),
}
