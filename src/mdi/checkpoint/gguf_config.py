"""config.json of a GGUF file, from its own entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdi.checkpoint.gguf_file import GgufFile, GgufTensor
from mdi.checkpoint.gguf_tower import tower_of
from mdi.core.errors import CheckpointError
from mdi.layers.rope import RopeScaling
from mdi.models.entries import FULL
from mdi.models.registry import family_of

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2vl": "Qwen2ForCausalLM",  # without their towers: positions of text have one axis
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen3vl": "Qwen3ForCausalLM",
    "qwen3vlmoe": "Qwen3MoeForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
MIXTURES = ("qwen3moe", "qwen3vlmoe")
GEMMA_3_27B_LAYERS = 62  # by which llama.cpp knows the one Gemma 3 with another scale of attention
FREQUENCIES = "rope_freqs.weight"
LLAMA3_POSITIONS = 8192
MEDIA_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def hub_config(model: GgufFile, mmproj: GgufFile | None = None) -> dict[str, Any]:
    """config.json of a model; mmproj: the file with its vision tower.

    Raises CheckpointError for an architecture that is not supported, and for a tower of another model.
    """
    kind = str(model.entries.get("general.architecture", "none"))
    if kind == "clip":
        raise CheckpointError(f"{model.name} holds a vision tower only: name the model, and this file with --mmproj")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF files of the architecture {kind!r} are not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    entry = _entries(model, kind)
    decoder = _decoder_config(model, entry) | _experts(model, kind, entry)
    if kind == "gemma3":
        decoder |= _gemma(entry, decoder)
    if mmproj is None:
        return _named(ARCHITECTURES[kind]) | decoder
    tower = tower_of(mmproj, kind)
    vision = tower.config(mmproj)
    _check_pair(model, mmproj, "embeddings have {} numbers", decoder["hidden_size"], _projected_size(mmproj))
    features = len(vision.get("deepstack_visual_indexes", ()))
    _check_pair(model, mmproj, "features go to {} layers", entry("n_deepstack_layers", features), features)
    decoder["rope_parameters"]["mrope_section"] = entry("rope.dimension_sections")[:3]
    top = _named(tower.architectures[kind])
    return top | {
        "text_config": decoder | {"model_type": f"{top['model_type']}_text"},
        "vision_config": vision,
        "tie_word_embeddings": decoder["tie_word_embeddings"],
        **_media_tokens(model),
    }


def _named(architecture: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": family_of(architecture).model_type}


def _projected_size(mmproj: GgufFile) -> Any:
    return mmproj.entries.get("clip.vision.projection_dim")


def _check_pair(model: GgufFile, mmproj: GgufFile, what: str, decoder: Any, tower: Any) -> None:
    """Raises CheckpointError where the two files disagree about a number."""
    if decoder != tower:
        raise CheckpointError(
            f"{mmproj.name} is of another model: its {what.format(tower)}, those of {model.name} {decoder}; take the "
            "file that was published beside it"
        )


def _entries(model: GgufFile, kind: str) -> Callable[..., Any]:
    def entry(name: str, default: Any = None) -> Any:
        found = model.entries.get(f"{kind}.{name}", default)
        if found is None:
            raise CheckpointError(f"{model.name} has no entry {kind}.{name}: convert the model anew")
        return found

    return entry


def _decoder_config(model: GgufFile, entry: Callable[..., Any]) -> dict[str, Any]:
    heads = entry("attention.head_count")
    head_dim = entry("attention.key_length", entry("embedding_length") // heads)
    if entry("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError("the GGUF file rotates a part of each head only, which is not supported")
    embedding = model.tensors.get("token_embd.weight")
    return {
        "hidden_size": entry("embedding_length"),
        "intermediate_size": entry("feed_forward_length"),
        "num_hidden_layers": entry("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": entry("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": entry("context_length"),
        "rms_norm_eps": entry("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0] if embedding else entry("vocab_size"),
        "rope_parameters": _rope(entry, model.tensors.get(FREQUENCIES), head_dim),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "torch_dtype": "bfloat16",
    }


def _gemma(entry: Callable[..., Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 3 has beside; of what files do not say, as llama.cpp computes it (`llama-model.cpp`)."""
    by_width = decoder["hidden_size"] // decoder["num_attention_heads"]
    is_27b = decoder["num_hidden_layers"] == GEMMA_3_27B_LAYERS
    return {
        "query_pre_attn_scalar": by_width if is_27b else decoder["head_dim"],
        "sliding_window": entry("attention.sliding_window"),
        "sliding_window_pattern": entry("attention.sliding_window_pattern", 6),
        "rope_parameters": {FULL: decoder["rope_parameters"]},
        "rope_local_base_freq": entry("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": entry("attn_logit_softcapping", 0.0),
        "final_logit_softcapping": entry("final_logit_softcapping", 0.0),
    }


def _experts(model: GgufFile, kind: str, entry: Callable[..., Any]) -> dict[str, Any]:
    """Entries about a mixture of experts; none for a model without."""
    if kind not in MIXTURES:
        if count := entry("expert_count", 0):
            raise CheckpointError(
                f"{model.name} mixes {count} experts in the architecture {kind!r}, as Mixtral does: not supported; "
                f"mixtures that are: {', '.join(MIXTURES)}"
            )
        return {}
    return {
        "num_experts": entry("expert_count"),
        "num_experts_per_tok": entry("expert_used_count"),
        "moe_intermediate_size": entry("expert_feed_forward_length"),
        "norm_topk_prob": entry("expert_weights_norm", True),  # llama.cpp computes these models so
    }


def _media_tokens(model: GgufFile) -> dict[str, int]:
    """Their ids, by the names that they have in all models of Qwen's."""
    tokens = {text: index for index, text in enumerate(model.entries.get("tokenizer.ggml.tokens", ()))}
    if missing := set(MEDIA_TOKENS.values()) - tokens.keys():
        raise CheckpointError(f"the tokenizer of {model.name} has no token {min(missing)}: convert the model anew")
    return {name: tokens[text] for name, text in MEDIA_TOKENS.items()}


def _rope(entry: Callable[..., Any], divisors: GgufTensor | None, head_dim: int) -> dict[str, Any]:
    """`rope_parameters`. divisors: the tensor that divides the frequencies, which files of Llama 3.1 and later have."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": entry("rope.freq_base", 10000.0)}
    scaling = entry("rope.scaling.type", "none")
    if divisors is not None:
        return rope | _llama3_scaling(divisors.floats(), rope["rope_theta"], head_dim)
    if scaling == "none":
        return rope
    rope |= {"rope_type": scaling, "factor": entry("rope.scaling.factor", 1.0)}
    if original := entry("rope.scaling.original_context_length", 0):
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3_scaling(divisors: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that gives these divisors. All models of Llama 3 have the same bounds; factors differ."""
    scaling = RopeScaling("llama3", float(divisors.max()), LLAMA3_POSITIONS)
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    made = frequencies / scaling.applied(frequencies, theta)
    if made.shape != divisors.shape or not torch.allclose(made, divisors, rtol=1e-3):
        raise CheckpointError(f"the file scales positions by a {FREQUENCIES} that is not Llama 3's: not supported")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": LLAMA3_POSITIONS,
    }
