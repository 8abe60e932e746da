"""The budget of the KV cache: what all nodes have memory for, and how long a sequence may be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mdi.checkpoint.published import QWEN2_VL_2B
from mdi.core.batch import CACHE_BLOCK
from mdi.core.config import CacheSettings
from mdi.core.errors import ConfigError
from mdi.models.registry import read_config
from mdi.planning.cache import (
    PLANNED_TOKENS,
    CacheNode,
    cache_budget,
    planned_bytes,
    planned_tokens,
    token_bytes,
)
from mdi.planning.hardware import Machine
from mdi.planning.plan import make_plan

FULL_SIZE = read_config(QWEN2_VL_2B)
EACH = 28 * 1024  # bytes a token of the 2B model


def alone(gigabytes: float, *, whole: bool = False) -> list[CacheNode]:
    return [CacheNode("starter", 28, gigabytes * 1e9, whole)]


def test_a_token_of_the_2b_model_takes_28_kibibytes() -> None:
    assert token_bytes(FULL_SIZE, "bfloat16", 28) == EACH


def test_with_memory_enough_sequences_have_the_model_s_length_up_to_the_default() -> None:
    budget = cache_budget(FULL_SIZE, CacheSettings(), "bfloat16", alone(100))
    assert (budget.sequence_length, budget.n_slots, budget.tokens) == (32_768, 16, 16 * 32_768)
    short = replace(FULL_SIZE, max_positions=1000)
    budget = cache_budget(short, CacheSettings(), "bfloat16", alone(100))
    assert (budget.sequence_length, budget.remedy, budget.tokens) == (1000, "", 16 * 1024)
    assert not budget.note


def test_without_a_limit_half_of_what_is_free_is_for_the_cache() -> None:
    budget = cache_budget(FULL_SIZE, CacheSettings(), "bfloat16", alone(8))
    assert budget.tokens == 4e9 // EACH // CACHE_BLOCK * CACHE_BLOCK
    assert budget.sequence_length == 32_768
    assert budget.remedy == ""  # the model takes no longer ones
    longer = cache_budget(replace(FULL_SIZE, max_positions=10**6), CacheSettings(), "bfloat16", alone(8))
    assert (longer.sequence_length, longer.remedy) == (32_768, "raise the server's --sequence-length")


def test_with_little_memory_sequences_are_shorter_and_a_note_says_so() -> None:
    budget = cache_budget(FULL_SIZE, CacheSettings(), "bfloat16", alone(0.2))
    assert budget.sequence_length == budget.tokens == 3456
    assert budget.note == (
        "the KV cache of starter has memory for 3456 tokens: sequences are 3456 tokens long at most, not 32768"
    )
    assert "--kv-cache-gb" in budget.remedy


def test_the_limit_is_of_each_node_and_the_fullest_one_decides() -> None:
    nodes = [CacheNode("starter", 10), CacheNode("secondary0", 12), CacheNode("finisher", 6)]
    budget = cache_budget(FULL_SIZE, CacheSettings(kv_cache_gb=1), "bfloat16", nodes)
    assert budget.tokens == 1e9 // (12 * 1024) // CACHE_BLOCK * CACHE_BLOCK
    halves = [CacheNode("starter", 28, n_kv_heads=1), CacheNode("finisher", 28, n_kv_heads=1)]
    budget = cache_budget(FULL_SIZE, CacheSettings(kv_cache_gb=1), "bfloat16", halves)
    assert budget.tokens == 1e9 // (EACH / 2) // CACHE_BLOCK * CACHE_BLOCK  # of two ranks, each with one KV head
    scarce = [*nodes[:2], CacheNode("finisher", 6, free_bytes=0.2e9)]
    assert "finisher has memory" in cache_budget(FULL_SIZE, CacheSettings(), "bfloat16", scarce).note


@pytest.mark.parametrize(
    ("settings", "gigabytes", "message"),
    [
        (CacheSettings(kv_cache_gb=4), 3, "a KV cache of 4.0 GB does not fit into the 3.0 GB that are free on starter"),
        (
            CacheSettings(20_000, kv_cache_gb=0.1),
            9,
            "has memory for 3456 tokens, and a sequence takes 20000: raise --kv",
        ),
        (CacheSettings(20_000), 0.2, "has memory for 3456 tokens, and a sequence takes 20000"),
        (CacheSettings(), 0.0001, "has memory for 0 tokens, and a sequence takes 32768"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_remedy(settings: CacheSettings, gigabytes: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cache_budget(FULL_SIZE, settings, "bfloat16", alone(gigabytes))


def test_a_limit_above_what_slots_can_take_needs_no_more_memory_than_they() -> None:
    settings = CacheSettings(1000, max_sequences=2, kv_cache_gb=50)
    assert cache_budget(FULL_SIZE, settings, "bfloat16", alone(1)).tokens == 2 * 1024


def test_devices_that_allocate_the_whole_cache_get_fewer_or_shorter_slots() -> None:
    budget = cache_budget(FULL_SIZE, CacheSettings(), "bfloat16", alone(4, whole=True))
    assert (budget.n_slots, budget.sequence_length) == (16, 4352)
    budget = cache_budget(FULL_SIZE, CacheSettings(20_000), "bfloat16", alone(4, whole=True))
    assert (budget.n_slots, budget.sequence_length, budget.tokens) == (3, 20_000, 3 * 20_032)
    assert "3 sequences of 20000 tokens at once: more wait" in budget.note
    with pytest.raises(ConfigError, match="a sequence takes 20000"):
        cache_budget(FULL_SIZE, CacheSettings(20_000), "bfloat16", alone(1, whole=True))


def test_a_plan_counts_the_limit_or_what_is_needed_at_least() -> None:
    assert planned_tokens(CacheSettings(), 10**6) == PLANNED_TOKENS
    assert planned_tokens(CacheSettings(10_000), 10**6) == 10_000
    assert planned_tokens(CacheSettings(), 1000) == 1000
    assert planned_tokens(CacheSettings(10_000, kv_cache_gb=1), 10**6) == 16 * 10_048
    assert (planned_bytes(CacheSettings(kv_cache_gb=1.5)), planned_bytes(CacheSettings())) == (1.5e9, float("inf"))


def test_a_node_s_limit_does_not_grow_with_its_layers() -> None:
    settings = CacheSettings(kv_cache_gb=0.5)
    machine = Machine(memory_bytes=4.45e9 + 0.5e9)  # the weights, and the limit
    plan = make_plan(
        FULL_SIZE,
        1,
        machines=[machine],
        dtype="bfloat16",
        cache_tokens=planned_tokens(settings, FULL_SIZE.max_positions),
        most_cache_bytes=planned_bytes(settings),
    )
    assert plan.layers == (28,)
