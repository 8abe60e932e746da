"""Where the shards of a model's weights begin and end: the parts that the ranks of a group have. Pure arithmetic.

A shard has whole query heads, and whole groups of a quantised weight's inputs; where these do not divide evenly, some
shards have one more. Sums over inputs are taken shard by shard, in order, on one node too: the bits depend on the
number of shards alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm

from mdi.core.errors import ConfigError
from mdi.core.group import VOCABULARY_BLOCK, InputShards, LayerShards, Rank
from mdi.core.quantization import FORMATS, ModelQuantization
from mdi.models.config import ModelConfig

Bounds = tuple[int, ...]
"""n_shards + 1 numbers, the first 0: shard i is [bounds[i], bounds[i + 1])."""

WHOLE_STEPS = 32
"""Shards are whole multiples of so many where that is possible: of whole tiles (AMX), which are many times as fast."""

LEAST_BLOCKS = 4  # a shard of the vocabulary has: with fewer, shards of whole blocks differ by too much


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
        head_dim, wide = config.head_dim, lcm(step, WHOLE_STEPS)
        head_steps = lcm(head_dim, step) // head_dim, lcm(head_dim, wide) // head_dim
        heads = _bounds("query heads", config.n_heads, n_shards, *head_steps)
        inner = {size: _bounds(what, size, n_shards, step, wide) for what, size in config.inner_sizes.items()}
        return cls(heads, inner, _vocabulary(config, n_shards))

    def of_layers(self, config: ModelConfig, rank: Rank) -> LayerShards:
        """A rank's shards of the inputs of its layers' products. config: the model's."""
        out = tuple(config.head_dim * head for head in self.heads)
        plain = self.inner.get(config.intermediate_size)
        mixed = self.inner[config.experts.inner_size] if config.experts else None
        down, expert_down = (None if bounds is None else _own(bounds, rank) for bounds in (plain, mixed))
        return LayerShards(_own(out, rank), down, expert_down)


def shard_step(quantization: ModelQuantization) -> int:
    """Inputs of a layer's products that lie together, as those of one scale do: shards have whole groups of them."""
    layers = FORMATS.get(quantization.layers or "")
    return lcm(layers.group or 1, layers.activation_group) if layers else 2


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


def whole_blocks(config: ModelConfig, n_shards: int) -> bool:
    """Whether shards of the vocabulary are whole blocks: ranks then need not give away all their logits."""
    return config.vocab_size >= LEAST_BLOCKS * VOCABULARY_BLOCK * n_shards


def _vocabulary(config: ModelConfig, n_shards: int) -> Bounds:
    size = config.vocab_size
    if not whole_blocks(config, n_shards):
        return _bounds("vocabulary", size, n_shards, 1, WHOLE_STEPS)
    ends = (VOCABULARY_BLOCK * round(size * shard / n_shards / VOCABULARY_BLOCK) for shard in range(n_shards))
    return (*ends, size)


def _own(bounds: Bounds, rank: Rank) -> InputShards:
    """A rank's shards, counted from its first one's beginning."""
    own = bounds[rank.first_shard : rank.last_shard + 1]
    return InputShards(tuple(bound - own[0] for bound in own), gcd(*bounds))


def _bounds(what: str, size: int, n_shards: int, step: int, wide: int) -> Bounds:
    """wide: steps that are taken where shards then differ by an eighth at most.

    Raises ConfigError where there are fewer steps than shards, or no whole number of them.
    """
    if n_shards == 1:
        return (0, size)
    if size % step or size // step < n_shards:
        raise ConfigError(
            f"{n_shards} shards are too many for the model's {what}, {size} in whole groups of {step}: use fewer "
            "(--shards, --tensor-parallel-size)"
        )
    if size % wide == 0 and (size // wide % n_shards == 0 or size // wide >= 8 * n_shards):
        step = wide
    return tuple(size // step * shard // n_shards * step for shard in range(n_shards + 1))
