"""Groups: how many shards a plan's weights are cut into, and which of them each rank has. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from mdi.core.errors import ConfigError
from mdi.core.group import Rank
from mdi.core.quantization import ModelQuantization
from mdi.models.config import ModelConfig
from mdi.models.shards import Shards, shard_step
from mdi.planning.hardware import Machine

MOST_RANKS = 8
"""Of a group: every rank exchanges with every other."""

MOST_SHARDS = 8
"""That a plan takes by itself: each one adds a partial sum to every exchange."""

NEARLY = 1.05
"""More shards are not worth a stage that is this much faster: measured speeds vary as much."""

SMALLER = "Make groups smaller (--groups, --tensor-parallel-size), and more stages of them"


def group_ranks(
    config: ModelConfig,
    groups: Sequence[int],
    machines: Sequence[Machine],
    quantization: ModelQuantization,
    shards: int = 1,
) -> tuple[Rank | None, ...]:
    """The rank of each node, in pipeline order; None where a node computes its stage alone.

    groups: ranks of each stage. machines: one for each node; a faster one gets more shards. shards: how many there are
    in all; 1 is as few as suit the groups. Raises ConfigError for a group that is too large.
    """
    if max(groups) == 1:
        return (None,) * sum(groups)
    _check_sizes(config, groups, quantization, shards)
    speeds = [
        [machine.bytes_per_s for machine in machines[first:last]] for first, last in pairwise([0, *accumulate(groups)])
    ]
    n_shards = shards if shards > 1 else _suitable(speeds, most_shards(config, quantization))
    return tuple(rank for stage in speeds for rank in _ranks(share_out(n_shards, stage)))


def share_out(n_shards: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Shards of each rank so that the slowest one is as fast as it can be: each has one at least."""
    shares = [1] * len(speeds)
    for _ in range(n_shards - len(speeds)):
        soonest = min(range(len(speeds)), key=lambda rank: (shares[rank] + 1) / speeds[rank])
        shares[soonest] += 1
    return tuple(shares)


def most_shards(config: ModelConfig, quantization: ModelQuantization) -> int:
    """The most shards, up to MOST_SHARDS, that a model's weights can be cut into."""
    for n_shards in range(MOST_SHARDS, 1, -1):
        try:
            Shards.of(config, n_shards, shard_step(quantization))
        except ConfigError:
            continue
        return n_shards
    return 1


def _check_sizes(config: ModelConfig, groups: Sequence[int], quantization: ModelQuantization, shards: int) -> None:
    largest, most = max(groups), most_shards(config, quantization)
    if largest > MOST_RANKS:
        raise ConfigError(f"a group of {largest} is too large: a stage has {MOST_RANKS} ranks at most. {SMALLER}")
    if largest > most:
        raise ConfigError(
            f"a group of {largest} is too large: the model's {config.n_heads} query heads and the widths of its layers "
            f"make {most} shard{'s' * (most > 1)} at most, and each rank needs one. {SMALLER}"
        )
    if 1 < shards < largest:
        raise ConfigError(f"a group of {largest} needs a shard for each rank, and --shards says {shards}: raise it")
    Shards.of(config, shards, shard_step(quantization))


def _suitable(speeds: Sequence[Sequence[float]], most: int) -> int:
    """The least number of shards that divides all stages about as well as any up to `most` does."""

    def excess(n_shards: int) -> float:
        """The time of the slowest rank by that of ranks with shares as exact as can be, in the worst stage."""
        return max(
            max(share / speed for share, speed in zip(share_out(n_shards, stage), stage, strict=True))
            * sum(stage)
            / n_shards
            for stage in speeds
        )

    counts = range(max(map(len, speeds)), most + 1)
    best = min(map(excess, counts))
    return next(n_shards for n_shards in counts if excess(n_shards) <= NEARLY * best)


def _ranks(shares: Sequence[int]) -> list[Rank | None]:
    if len(shares) == 1:
        return [None]
    return [Rank(first, last, sum(shares)) for first, last in pairwise([0, *accumulate(shares)])]
