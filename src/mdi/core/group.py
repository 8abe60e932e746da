"""A group: the ranks that compute one stage together (tensor parallel), as each of them sees the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from mdi.core.batch import Batch


VOCABULARY_BLOCK = 1024
"""Tokens, from token 0 on, whose probabilities are summed together, and then the sums of all blocks."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The part of a stage's weights that one rank has: the shards [first_shard, last_shard) of n_shards.

    A shard is some query heads, with the KV heads that they use, some columns of each MLP, and some rows of the LM
    head: see `models/shards.py`. Rank 0 of a group has its first shards, and leads it.
    """

    first_shard: int
    last_shard: int
    n_shards: int

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.last_shard)

    @property
    def share(self) -> float:
        """Its part of the stage."""
        return len(self.shards) / self.n_shards

    @property
    def leads(self) -> bool:
        return self.first_shard == 0


@dataclass(frozen=True, slots=True)
class InputShards:
    """The shards that a stage has of a product's inputs: each is summed by itself, and its sum rounded.

    bounds: where they begin and end, in the stage's own inputs, from 0 on. step: divides the bounds of all shards of
    the model: products of all ranks are computed in the same way.
    """

    bounds: tuple[int, ...]
    step: int

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def slices(self) -> list[slice]:
        return list(map(slice, self.bounds, self.bounds[1:]))


@dataclass(frozen=True, slots=True)
class LayerShards:
    """The shards that a stage has of what its layers add to residuals: of attention, of MLPs, of each expert's MLP.

    None where layers have none of these.
    """

    out: InputShards
    down: InputShards | None
    expert_down: InputShards | None


class Group(Protocol):
    """The other ranks of a group, for the thread that computes a rank.

    All ranks call the same methods in the same order, with tensors of the same shapes. Each of them raises LinkError,
    naming the node, when a rank is lost, and when the group is closed, which another thread may do.
    """

    @property
    def rank(self) -> Rank: ...

    def lead(self, batch: Batch, hidden: Tensor) -> None:
        """Gives the others the batch that is computed next. For rank 0. hidden: [tokens, hidden_size]."""

    def follow(self) -> tuple[Batch, Tensor]:
        """Waits for what rank 0 gives to `lead`. For the others.

        Samplings with adjustments and masks come as `FROM_ALL_LOGITS`: only rank 0 needs those.
        """

    def exchange(self, partials: Tensor) -> None:
        """Sends the partial sums that this rank computed, and receives those of the others.

        partials: [n_shards, rows, outputs] in the stage's dtype, contiguous, on the CPU: this rank's shards are filled
        in, and the others' are written.
        """

    def send(self, partials: Tensor, rows: slice) -> None:
        """Sends some rows of `exchange`, and does not wait: they may be read until the others' have been received.

        rows: the next ones: in order, each once. Of a tensor that was received, the same rows may be sent again. The
        rows of another tensor may be sent before all of this one have been received.
        """

    def receive(self, partials: Tensor, last_row: int) -> None:
        """Waits until the others' rows [0, last_row) are there, of a tensor whose rows are all sent.

        With the last rows of all that was sent it returns when the own ones have been written, too.
        """

    def gather(self, columns: Tensor) -> list[Tensor] | None:
        """The columns of all ranks, in their order, for rank 0; None for the others, who send theirs.

        columns: [rows, any number], on the CPU, of one dtype on all ranks.
        """
