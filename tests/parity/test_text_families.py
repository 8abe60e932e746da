"""Text families against transformers: logits and greedy tokens, on one node and on two, with every scaling of RoPE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from mdi.core.errors import CheckpointError
from mdi.models.registry import read_config
from tests.parity.conftest import load_stages, qwen2_vl_config
from tests.parity.test_model import Prompt, greedy_tokens, logits_of, relative_difference

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 32, "sliding_window": 11, "pad_token_id": None, "max_position_embeddings": 512}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama with heads of their own size": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32}),
    "llama 3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral with a window": (MistralConfig, MistralForCausalLM, {"sliding_window": 11, "head_dim": 32}),
    "ministral": (
        MinistralConfig,
        MinistralForCausalLM,
        {"sliding_window": 67, "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layer_interval": 2, "pad_token_id": None}),
    "smollm3 with a window": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {
            "no_rope_layers": [0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 20,
            "pad_token_id": None,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3 yarn": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 32, "rope_parameters": YARN | {"attention_factor": 0.8, "beta_fast": 16, "truncate": False}},
    ),
    "qwen3 experts": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS | {"norm_topk_prob": True}),
    "qwen3 experts beside MLPs": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS | {"mlp_only_layers": [0, 2]}),
    "qwen3 experts in every second layer": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        EXPERTS | {"decoder_sparse_step": 2, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "qwen2 yarn": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}},
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        GEMMA | {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
    ),
    "gemma3 as the larger ones": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        GEMMA
        | {
            "hidden_size": 96,  # whose root bfloat16 rounds
            "query_pre_attn_scalar": 24,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "qwen2 with a window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
}
SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
TEXT = [(7 * index + index // 9) % 250 for index in range(200)]  # longer than the lengths that scalings begin from
MIXED = [Prompt(TEXT), Prompt(TEXT[:7]), Prompt(TEXT[50:120])]


def saved(model: Any, path: Path) -> Path:
    """The model with norms that differ from 1, as transformers saves it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config_class, model_class, changes = FAMILIES[name]
    oracle = model_class(config_class(**{**SIZES, **changes})).eval()
    path = saved(oracle, tmp_path)
    with torch.no_grad():
        theirs = oracle(torch.tensor([TEXT]), use_cache=False).logits[0]
        answers = [
            oracle.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
            for ids in (TEXT, TEXT[:7], TEXT[50:120])
        ]
    for cuts in ((), (2,)):
        assert relative_difference(logits_of(load_stages(path, *cuts), Prompt(TEXT)), theirs) < 1e-4
        assert greedy_tokens(load_stages(path, *cuts), MIXED, 12) == answers


def test_axes_of_positions_and_yarn_go_together(tmp_path: Path) -> None:
    """As the documentation of Qwen2.5-VL asks for long texts."""
    torch.manual_seed(3)
    oracle = Qwen2VLForConditionalGeneration(
        qwen2_vl_config(rope_parameters=YARN | {"mrope_section": [2, 3, 3]}, max_position_embeddings=256)
    ).eval()
    path = saved(oracle, tmp_path)
    prompt = Prompt(TEXT[:40], (1, 8, 12), TEXT[:90])
    with torch.no_grad():
        theirs = oracle(**prompt.oracle_inputs(), use_cache=False).logits[0]
    assert relative_difference(logits_of(load_stages(path), prompt), theirs) < 1e-4


def test_gemma_in_bfloat16_is_as_near_to_its_numbers_as_transformers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config_class, model_class, changes = FAMILIES["gemma3 as the larger ones"]
    oracle = model_class(config_class(**{**SIZES, **changes})).eval()
    path, ids = saved(oracle, tmp_path), torch.tensor(TEXT)
    [stage] = load_stages(path, dtype=torch.bfloat16)
    ours = logits_of([stage], Prompt(TEXT))
    with torch.no_grad():
        exact = oracle(ids[None], use_cache=False).logits[0]
        rounded = oracle.to(torch.bfloat16)
        theirs = rounded(ids[None], use_cache=False).logits[0]
        assert torch.equal(stage.embed(ids), rounded.model.embed_tokens(ids))
    assert relative_difference(ours, exact) < 1.1 * relative_difference(theirs, exact) < 0.03


def test_gemma_has_two_forms_of_config(tmp_path: Path) -> None:
    """The older one is that of the files on the hub; transformers reads both, and saves the newer."""
    older = {
        **SIZES,
        **GEMMA,
        "num_hidden_layers": 7,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_local_base_freq": 2000,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_theta": 100000,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": True,
    }
    Gemma3TextConfig(**older).save_pretrained(tmp_path)
    newer = json.loads((tmp_path / "config.json").read_text())
    assert not {"rope_theta", "rope_scaling"} & newer.keys()
    config = read_config(older)
    assert config == read_config(newer)
    assert [kind.window for kind in config.kinds] == [11, 11, 0, 11, 11, 0, 11]
    assert [(rope.theta, rope.scaling and rope.scaling.factor) for rope in config.ropes] == [(1e5, 8), (2e3, None)]
    assert (config.rotation_of(1), config.rotation_of(2)) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is set, which is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set, which is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is set, which is not supported"),
        ({"hidden_activation": "gelu"}, "activation 'gelu' is not supported in the decoder"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar should be greater than 0"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters has 'rope_type', where full_attention and"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "RoPE scaling of type 'dynamic' is not supported",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "'linear' needs factor"),
        (
            {"rope_parameters": None, "rope_local_base_freq": 0.0},
            "rope_parameters.sliding_attention.rope_theta should be greater than 0",
        ),
    ],
)
def test_what_is_not_computed_of_gemma_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = Gemma3TextConfig(**SIZES).to_dict() | {"architectures": ["Gemma3ForCausalLM"]}
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        read_config(json.loads(json.dumps(config | changes)))


@pytest.mark.parametrize(
    ("name", "most"),
    [("mistral with a window", 131072), ("llama yarn", 2048), ("qwen3", 32768)],
)
def test_a_sequence_may_be_as_long_as_the_model_is_scaled_to(name: str, most: int) -> None:
    config_class, model_class, changes = FAMILIES[name]
    config = config_class(**{**SIZES, **changes}).to_dict() | {"architectures": [model_class.__name__]}
    assert read_config(config).max_positions == most
    extended = config | {"max_position_embeddings": 64}
    if name == "llama yarn":
        assert read_config(extended).max_positions == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias is set, which is not supported"),
        ({"mlp_bias": True}, "mlp_bias is set, which is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE scaling of type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE scaling of type 'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor should be greater than or equal to 1"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "RoPE scaling of type 'llama3' needs low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4 is not below high_freq_factor 4"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5: only 1 is supported"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layers with chunked_attention are not"),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": [1]},
            "no_rope_layers has 1",
        ),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not supported .models that write text end with"),
        ({"architectures": ["Qwen2Model"]}, "Qwen2Model is not supported .models that write text end with"),
        ({"architectures": ["Llama4ForCausalLM"]}, "architecture Llama4ForCausalLM is not supported; the closest"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration is not supported"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        read_config(json.loads(json.dumps(config | changes)))
