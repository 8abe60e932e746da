"""Token masks at the node with the head: they arrive from the starter, apart from the batches they belong to."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from mdi.core.batch import Batch
from mdi.core.errors import LinkError

TIMEOUT_S = 300.0  # masks may wait behind other data on a slow link; a starter that is lost closes the inbox sooner


class MaskInbox:
    """The token masks of one epoch. The event loop adds them, the compute thread waits for those of its batch."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrived: dict[int, list[bytes]] = {}
        self._closed = False

    def add(self, batch_id: int, masks: Iterable[bytes]) -> None:
        """Adds the next masks of a batch."""
        with self._changed:
            self._arrived.setdefault(batch_id, []).extend(masks)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends every wait: no more masks arrive. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def complete(self, batch: Batch) -> Batch:
        """The batch with its masks. Waits for them; raises LinkError when they do not arrive."""
        missing = len(batch.token_masks)
        if not missing:
            return batch
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._arrived.get(batch.id, ())) >= missing, TIMEOUT_S)
            masks = self._arrived.pop(batch.id, [])
        if len(masks) != missing:
            raise LinkError(f"{len(masks)} of {missing} token masks of a batch arrived")
        return batch.with_token_masks(masks)
