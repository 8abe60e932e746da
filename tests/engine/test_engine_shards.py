"""Shards and the KV cache's dtype: settings that every node gets, and that the text depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdi import Engine, SamplingParams
from mdi.core.errors import ConfigError
from mdi.core.outputs import Completion

PARAMS = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
SETTINGS: dict[str, Any] = {"sequence_length": 1024, "max_sequences": 2, "shards": 4, "kv_cache_dtype": "int8"}


def answer(checkpoint: Path, **settings: Any) -> Completion:
    with Engine(checkpoint, **SETTINGS | settings) as engine:
        return engine.chat("What is a shard? " * 20, PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_shards_on_three_nodes_have_the_bits_of_four_on_one(tiny_checkpoint: Path, dtype: str) -> None:
    alone = answer(tiny_checkpoint, dtype=dtype)
    spread = answer(tiny_checkpoint, dtype=dtype, n_nodes=3)
    assert (spread.token_ids, spread.logprobs) == (alone.token_ids, alone.logprobs)


def test_more_shards_than_heads_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="5 shards are too many for the model's query heads, 4"):
        Engine(tiny_checkpoint, shards=5)
