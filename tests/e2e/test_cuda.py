"""Whole engines on an NVIDIA GPU: the answers of a CPU, on one node, over a layer split, and by groups of ranks.

Skipped where there is no GPU. Products of a GPU round otherwise than those of a CPU, and otherwise for other numbers of
rows: tokens are compared in float32 and on answers that the bundled model is sure of, never bits.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.checkpoints import tiny_config, tiny_deepstack_config, tiny_text_config, tiny_windowed_config
from testing.videos import encoded, numbered
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.random_weights import write_random_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SETTINGS: dict[str, Any] = {"sequence_length": 1024, "max_sequences": 8}
GREEDY = SamplingParams(temperature=0, max_tokens=24)
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": tiny_text_config(),
    "qwen3_moe": tiny_text_config(
        "qwen3_moe", head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "mistral": tiny_text_config("mistral", sliding_window=20, head_dim=32),
    "qwen2_vl": tiny_config(),
    "qwen2_5_vl": tiny_windowed_config(),
    "qwen3_vl": tiny_deepstack_config(),
}


def conversations(photograph: bytes, *, sees: bool = True) -> list[Any]:
    """A short text, a long one, an image, a video."""
    text = ["Name three colours.", "many words, " * 40]
    image = [{"type": "image", "image": photograph}, {"type": "text", "text": "What is this?"}]
    film = [{"type": "video", "video": encoded(numbered(8))}, {"type": "text", "text": "What moves?"}]
    return [[{"role": "user", "content": content}] for content in [*text, *([image, film] if sees else [])]]


def answers(engine: Engine, asked: list[Any], params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    """The tokens of streams that run together."""
    streams = [engine.submit(messages, params) for messages in asked]
    return [tuple(stream.completion().samples[0].token_ids) for stream in streams]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_the_tokens_of_a_cpu(name: str, photograph: bytes, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / name, MODELS[name])
    asked = conversations(photograph, sees="vision_config" in MODELS[name])
    with Engine(checkpoint, dtype="float32", **SETTINGS) as engine:
        expected = answers(engine, asked)
    with Engine(checkpoint, dtype="float32", device="cuda", **SETTINGS) as engine:
        assert answers(engine, asked) == expected


@pytest.mark.parametrize(
    "kind",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"kv_cache_dtype": "int8"},
    ],
    ids=lambda kind: "-".join(kind.values()),
)
def test_the_bundled_model_answers_as_on_a_cpu(kind: dict[str, Any], photograph: bytes) -> None:
    asked = conversations(photograph)[:1]
    with Engine("bundled", **SETTINGS, **kind) as engine:
        expected = answers(engine, asked)
    with Engine("bundled", device="cuda", **SETTINGS, **kind) as engine:
        assert answers(engine, asked) == expected


@pytest.mark.parametrize(
    "division",
    [{"n_nodes": 3}, {"groups": (2,)}, {"groups": (1, 2)}],
    ids=["three stages", "two ranks", "a stage and two ranks"],
)
@pytest.mark.usefixtures("no_process_left")
def test_nodes_have_the_tokens_of_one(division: dict[str, Any], photograph: bytes) -> None:
    asked = conversations(photograph)
    with Engine("bundled", dtype="float32", device="cuda", **SETTINGS) as engine:
        expected = answers(engine, asked)
        drawn = answers(engine, asked, SamplingParams(temperature=1, seed=5, max_tokens=24, top_k=20))
    with Engine("bundled", dtype="float32", device="cuda", encryption=True, **SETTINGS, **division) as engine:
        assert answers(engine, asked) == expected
        assert answers(engine, asked, SamplingParams(temperature=1, seed=5, max_tokens=24, top_k=20)) == drawn


@pytest.mark.parametrize("kind", [{"dtype": "bfloat16"}, {"quantization": "int4"}], ids=["bfloat16", "int4"])
def test_ranks_compute_in_the_types_that_ship(kind: dict[str, Any], photograph: bytes) -> None:
    asked = conversations(photograph)[:1]
    with Engine("bundled", device="cuda", shards=2, **SETTINGS, **kind) as engine:
        expected = answers(engine, asked)
    with Engine("bundled", device="cuda", groups=(2,), **SETTINGS, **kind) as engine:
        assert answers(engine, asked) == expected


def test_streams_survive_a_lost_rank() -> None:
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    with Engine("bundled", dtype="float32", device="cuda", groups=(2,), recovery_timeout_s=100, **SETTINGS) as engine:
        undisturbed = engine.submit("Number 1", params).completion().token_ids
        stream = engine.submit("Number 1", params)
        wait_for(lambda: bool(stream.timing.first_token_s), 60)
        os.kill(next(node.pid for node in engine.nodes() if node.name != "starter"), signal.SIGKILL)
        assert stream.completion().token_ids == undisturbed
        assert engine.recovery.recoveries == 1
