"""A link to given nodes, without a launcher: for tests and benchmarks of links alone."""

from __future__ import annotations

from collections.abc import Sequence

from mdi.cluster.delivery import Deliver
from mdi.cluster.link import GrpcLink, PipelineSettings
from mdi.cluster.monitor import Monitor
from mdi.cluster.node_client import NodeAddress
from mdi.core.progress import Progress
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic


class OwnLink(GrpcLink):
    """A link that is wired from the start, with a monitor of its own. Raises as `GrpcLink.wire` does."""

    def __init__(
        self,
        nodes: Sequence[NodeAddress],
        settings: PipelineSettings,
        deliver: Deliver,
        *,
        progress: Progress | None = None,
        timeout_s: float = 600.0,
        identity: Identity | None = None,
    ) -> None:
        self.monitor = Monitor(identity)
        super().__init__(self.monitor, settings, deliver, progress)
        try:
            self.wire(nodes, timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def traffic(self) -> Traffic:
        return self.monitor.traffic

    def close(self) -> None:
        super().close()
        self.monitor.close()
