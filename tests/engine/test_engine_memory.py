"""A KV cache with little memory: answers are those of requests alone, prompts that can never fit are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from testing.checkpoints import tiny_config

from mdi import Engine, SamplingParams
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.errors import ConfigError, PromptTooLongError
from mdi.core.messages import TokenIds
from mdi.engine import Completion

TOKEN_BYTES = 6 * 2 * 2 * 16 * 4  # of the tiny model in float32, all layers
WARM = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True, top_logprobs=2)


def prompt(number: int, length: int) -> TokenIds:
    return TokenIds(tuple((number * 7 + index * (number + 3)) % 250 for index in range(length)))


def together(engine: Engine, prompts: Sequence[TokenIds]) -> list[Completion]:
    streams = [engine.submit(prompt, WARM) for prompt in prompts]
    return [stream.completion() for stream in streams]


@pytest.mark.parametrize(
    ("dtype", "n_nodes"),
    [
        ("float32", 1),
        pytest.param("float32", 2, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1, marks=pytest.mark.slow),
    ],
)
def test_a_preempted_sequence_has_the_tokens_and_logprobs_that_it_has_alone(
    tiny_checkpoint: Path, dtype: str, n_nodes: int
) -> None:
    """Four of up to 4 blocks each, in memory for 6 in all."""
    size = TOKEN_BYTES * (0.5 if dtype == "bfloat16" else 1.0) / n_nodes
    prompts = [prompt(number, length) for number, length in enumerate((126, 40, 60, 30))]
    limits: dict[str, Any] = {"sequence_length": 256, "max_sequences": 4, "dtype": dtype, "n_nodes": n_nodes}
    with Engine(tiny_checkpoint, kv_cache_gb=6 * 64 * size / 1e9, **limits) as engine:
        assert engine._cluster.cache.tokens == 6 * 64
        answers = together(engine, prompts)
        assert engine.cache.preemptions > 0
        assert engine.cache.used_share == 0
    with Engine(tiny_checkpoint, **limits) as engine:
        expected = [together(engine, [prompt])[0] for prompt in prompts]
    assert [answer.samples for answer in answers] == [answer.samples for answer in expected]
    assert all(answer.usage.cached_tokens == 0 for answer in answers)


def test_a_prompt_that_can_never_fit_is_refused_at_once_with_the_remedy(tiny_checkpoint: Path) -> None:
    with Engine(tiny_checkpoint, dtype="float32", kv_cache_gb=300 * TOKEN_BYTES / 1e9) as engine:
        assert engine.sequence_length == 256
        with pytest.raises(
            PromptTooLongError, match=r"has 300 tokens .* length is 256.*raise the server's --kv-cache-gb"
        ):
            engine.submit(prompt(0, 300))
        answer = engine.chat(prompt(0, 200), SamplingParams(temperature=0, ignore_eos=True))
        assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 56)


def test_a_sequence_length_that_does_not_fit_the_memory_is_refused_at_the_start(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="memory for 256 tokens, and a sequence takes 512: raise --kv-cache-gb"):
        Engine(tiny_checkpoint, dtype="float32", sequence_length=512, kv_cache_gb=300 * TOKEN_BYTES / 1e9)
    with pytest.raises(ConfigError, match="kv_cache_gb must be above 0"):
        Engine(tiny_checkpoint, kv_cache_gb=0)


@pytest.mark.slow
def test_every_node_gives_back_what_is_not_needed(tmp_path: Path) -> None:
    """Six different prompts of 18 MB each in memory for 20 MB: on two nodes, half of it each."""
    each = 6 * 2 * 32 * 16 * 4  # bytes a token
    path = write_random_checkpoint(
        tmp_path / "wide",
        tiny_config(hidden_size=512, num_attention_heads=32, num_key_value_heads=32),
    )
    with Engine(path, n_nodes=2, dtype="float32", kv_cache_gb=1100 * each / 2 / 1e9, max_sequences=6) as engine:
        greedy = SamplingParams(temperature=0, max_tokens=4)
        engine.chat(prompt(9, 900), greedy)
        before = resident_mb(engine)
        for number in range(6):
            engine.chat(prompt(number, 900), greedy)
        after = resident_mb(engine)
    assert all(now < then + 8 for now, then in zip(after, before, strict=True))


def resident_mb(engine: Engine) -> list[float]:
    return [psutil.Process(node.pid).memory_info().rss / 1e6 for node in engine.nodes()]
