"""Text families through whole engines: tokenizer, template, plan and nodes give the answers of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from testing.checkpoints import tiny_gemma_config, tiny_text_config
from testing.oracle import Oracle

from mdi import Engine, SamplingParams
from mdi.checkpoint.published import PUBLISHED
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.planning.predict import stage_summary

QUESTION = "What is at hand?"
GREEDY = SamplingParams(temperature=0, max_tokens=8)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 20, "head_dim": 32},
    "gemma3_text": tiny_gemma_config(query_pre_attn_scalar=24, pad_token_id=None),
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 2, "pad_token_id": None},
    "qwen3": {"head_dim": 32, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
PARAMETERS = {
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen2-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_248_023_552,
    "smollm3-3b": 3_075_098_624,
    "gemma-3-1b": 999_885_952,
}
"""As the hub counts them."""


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_text_config(request.param, **FAMILIES[request.param])
    return write_random_checkpoint(tmp_path_factory.mktemp(request.param) / request.param, config)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    return Oracle(checkpoint).answer(QUESTION)[: GREEDY.max_tokens]


@pytest.mark.parametrize("n_nodes", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_answers_are_those_of_transformers(checkpoint: Path, expected: list[int], n_nodes: int) -> None:
    with Engine(checkpoint, n_nodes=n_nodes, dtype="float32") as engine:
        answer = engine.chat([{"role": "user", "content": QUESTION}], GREEDY)
    assert list(answer.token_ids) == expected


@pytest.mark.parametrize("quantization", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_quantised_model_answers_the_same_on_one_node_and_on_three(checkpoint: Path, quantization: str) -> None:
    answers = []
    for n_nodes in (1, 3):
        with Engine(checkpoint, n_nodes=n_nodes, dtype="bfloat16", quantization=quantization) as engine:
            answers.append(engine.chat([{"role": "user", "content": QUESTION}], GREEDY).token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_of_published_models_have_as_many_parameters(name: str) -> None:
    config = read_config(PUBLISHED[name])
    summary = stage_summary(config, StageSpec.everything(config), "bfloat16")
    assert summary.parameters == PARAMETERS[name]
