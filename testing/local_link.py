"""A link whose later stages run in this process."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mdi.cluster.delivery import Deliver, Rewired
from mdi.core.batch import Batch
from mdi.models.stage import Stage


class LocalLink:
    """Runs the later stages in `send`: one thread, no network, no loss."""

    def __init__(self, stages: Sequence[Stage], deliver: Deliver) -> None:
        self._stages = stages
        self._deliver = deliver

    def send(self, batch: Batch, hidden: Tensor) -> None:
        for stage in self._stages:
            hidden = stage.run(batch, hidden)
            batch = batch.beyond(stage.spec.last_layer)
        result = self._stages[-1].sample(batch, hidden)
        assert result is not None
        self._deliver(result)

    def recover(self) -> None:
        self._deliver(Rewired())

    def close(self) -> None:
        pass
