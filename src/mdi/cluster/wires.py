"""Which node talks to which: the stages of a pipeline, and the ranks of each. Pure arithmetic on nodes' numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mdi.core.group import Rank


@dataclass(frozen=True)
class Wires:
    """Nodes are numbered in pipeline order: the starter is 0. stages: the nodes of each, its leader first."""

    stages: tuple[range, ...]

    @classmethod
    def of(cls, ranks: Sequence[Rank | None]) -> Wires:
        """ranks: of every node; None for one that computes its stage alone."""
        firsts = [node for node, rank in enumerate(ranks) if rank is None or rank.leads]
        return cls(tuple(range(first, end) for first, end in zip(firsts, [*firsts[1:], len(ranks)], strict=True)))

    @property
    def head(self) -> int:
        """The node that draws tokens: it leads the last stage."""
        return self.stages[-1].start

    def stage(self, node: int) -> range:
        """The nodes of its stage."""
        return self.stages[self._place(node)]

    def next(self, node: int) -> int | None:
        """The node that it sends batches to; None for the head, and for those who lead no stage."""
        place = self._place(node)
        leads, last = node == self.stages[place].start, place + 1 == len(self.stages)
        return None if last or not leads else self.stages[place + 1].start

    def previous(self, node: int) -> int | None:
        """The node that it gets batches from; None for the starter, and for those who lead no stage."""
        place = self._place(node)
        return self.stages[place - 1].start if place and node == self.stages[place].start else None

    def _place(self, node: int) -> int:
        return next(place for place, stage in enumerate(self.stages) if node in stage)
