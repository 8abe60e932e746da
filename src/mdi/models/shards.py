"""Where the shards of a model's weights begin and end: the parts that the ranks of a group have. Pure arithmetic.

A shard has whole query heads, and whole groups of a quantised weight's inputs; where these do not divide evenly, some
shards have one more. Sums over inputs are taken shard by shard, in order, on one node too: the bits depend on the
number of shards alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

from mdi.core.errors import ConfigError
from mdi.core.group import Rank
from mdi.core.quantization import FORMATS, ModelQuantization
from mdi.models.config import ModelConfig

Bounds = tuple[int, ...]
"""n_shards + 1 numbers, the first 0: shard i is [bounds[i], bounds[i + 1])."""


@dataclass(frozen=True)
class Shards:
    """The shards of a model. heads: query heads. inner: columns of MLPs, by inner width. vocab: rows of the LM head."""

    heads: Bounds
    inner: dict[int, Bounds]
    vocab: Bounds

    @classmethod
    def of(cls, config: ModelConfig, n_shards: int, step: int = 2) -> Shards:
        """step: inputs of a layer's products that lie together, as those with one activation scale do.

        Raises ConfigError where the model cannot be cut into so many.
        """
        if n_shards < 1:
            raise ConfigError(f"the number of shards must be at least 1, got {n_shards}")
        heads_step = lcm(config.head_dim, step if n_shards > 1 else 1) // config.head_dim
        heads = _bounds("query heads", config.n_heads, n_shards, heads_step)
        inner = {size: _bounds(what, size, n_shards, step) for what, size in config.inner_sizes.items()}
        return cls(heads, inner, _vocabulary(config, n_shards))


def shard_step(quantization: ModelQuantization) -> int:
    """Inputs of a layer's products that lie together: those that share a scale, or an activation's scale."""
    if quantization.layers is None:
        return 2
    format_ = FORMATS[quantization.layers]
    return lcm(format_.group or 1, format_.activation_group)


def vocabulary_rows(config: ModelConfig, rank: Rank | None) -> range:
    """The rows of the LM head that a rank has; None is all of them."""
    if rank is None:
        return range(config.vocab_size)
    bounds = _vocabulary(config, rank.n_shards)
    return range(bounds[rank.first_shard], bounds[rank.last_shard])


def kv_heads(config: ModelConfig, heads: range) -> tuple[int, ...]:
    """The KV heads of a rank with these query heads, one for each run of so many query heads: all runs are as long.

    Where a rank has another number of query heads of one KV head than of the next, a KV head is there more than once.
    """
    shared = config.n_heads // config.n_kv_heads
    used = [head // shared for head in heads]
    run = _run(used)
    return tuple(used[::run])


def rank_config(config: ModelConfig, rank: Rank, shards: Shards) -> ModelConfig:
    """The config of a rank's layers: fewer heads, narrower MLPs. Its head has a part of the vocabulary."""
    heads = range(shards.heads[rank.first_shard], shards.heads[rank.last_shard])
    widths = {size: bounds[rank.last_shard] - bounds[rank.first_shard] for size, bounds in shards.inner.items()}
    experts = config.experts
    return replace(
        config,
        n_heads=len(heads),
        n_kv_heads=len(kv_heads(config, heads)),
        intermediate_size=widths.get(config.intermediate_size, config.intermediate_size),
        experts=replace(experts, inner_size=widths[experts.inner_size]) if experts else None,
    )


def _run(used: Sequence[int]) -> int:
    """The longest length into runs of which the heads of every KV head divide."""
    for length in range(len(used), 0, -1):
        starts = range(0, len(used), length)
        if len(used) % length == 0 and all(len(set(used[start : start + length])) == 1 for start in starts):
            return length
    raise AssertionError("runs of one head always divide")


def _vocabulary(config: ModelConfig, n_shards: int) -> Bounds:
    return _bounds("vocabulary", config.vocab_size, n_shards, 1)


def _bounds(what: str, size: int, n_shards: int, step: int) -> Bounds:
    """Raises ConfigError where there are fewer steps than shards, or no whole number of them."""
    if n_shards == 1:
        return (0, size)
    if size % step or size // step < n_shards:
        raise ConfigError(
            f"{n_shards} shards are too many for the model's {what}, {size} in whole groups of {step}: use fewer "
            "(--shards, --tensor-parallel-size)"
        )
    return tuple(size // step * shard // n_shards * step for shard in range(n_shards + 1))
