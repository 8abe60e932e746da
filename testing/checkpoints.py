"""Configs of tiny checkpoints with random weights."""

from __future__ import annotations

from typing import Any

_TINY_TEXT: dict[str, Any] = {
    "bos_token_id": 256,
    "eos_token_id": 258,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 272,
}

_TINY_VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 32,
    "mlp_ratio": 4,
    "num_heads": 2,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A Qwen2-VL config of about 0.3 million parameters, in the hub's flat form.

    Tokens 0..255 are the bytes, 256..263 the special tokens. overrides: replace entries; those of
    `vision_config` are merged into the tiny tower's.
    """
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **_TINY_TEXT,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "vision_token_id": 261,
        "image_token_id": 262,
        "video_token_id": 263,
        **overrides,
    }
    vision = {"hidden_size": config["hidden_size"], **_TINY_VISION, **overrides.get("vision_config", {})}
    return config | {"vision_config": vision}


def tiny_windowed_config(**overrides: Any) -> dict[str, Any]:
    """The same as a Qwen2.5-VL: a tower of four blocks, two of which see whole frames."""
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": _TINY_TEXT["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
    }
    family = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    return tiny_config(**family, **overrides) | {"vision_config": vision}


def tiny_deepstack_config(**text: Any) -> dict[str, Any]:
    """The same as a Qwen3-VL, whose entries of the decoder are nested: three blocks of the tower feed three layers."""
    sizes = {name: value for name, value in _TINY_TEXT.items() if name not in ("torch_dtype", "use_sliding_window")}
    rope = {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {**sizes, "head_dim": 32, "rope_scaling": rope, "model_type": "qwen3_vl_text", **text},
        "vision_config": {
            "deepstack_visual_indexes": [0, 1, 3],
            "depth": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "intermediate_size": 52,
            "model_type": "qwen3_vl",
            "num_heads": 2,
            "num_position_embeddings": 36,
            "out_hidden_size": _TINY_TEXT["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "tie_word_embeddings": True,
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "image_token_id": 262,
        "video_token_id": 263,
    }


def tiny_deepstack_experts_config(**text: Any) -> dict[str, Any]:
    """The same with a mixture of experts in each layer."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    made = tiny_deepstack_config(**experts, model_type="qwen3_vl_moe_text", **text)
    return made | {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}


def tiny_gemma_config(**overrides: Any) -> dict[str, Any]:
    """The same as a Gemma 3, in the form of the larger ones on the hub: each third layer attends to all tokens.

    Its head is not tied: random weights, whose embedding is scaled, would repeat the last token.
    """
    gemma = {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": False,
    }
    return tiny_text_config("gemma3_text", **gemma | overrides)


def tiny_text_config(family: str = "qwen2", /, **overrides: Any) -> dict[str, Any]:
    """The language model of `tiny_config` alone, as a text family's config. family: its model_type."""
    name = family.title().replace("_", "")
    return {"architectures": [f"{name}ForCausalLM"], "model_type": family, **_TINY_TEXT, **overrides}
