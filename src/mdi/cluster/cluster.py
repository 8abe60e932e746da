"""One model over this process and its nodes: the first stage here, the others started or awaited, linked and watched.

Knows checkpoints, launchers and links; nothing of requests.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import psutil
import torch

from mdi.checkpoint.loader import load_chunk, load_source
from mdi.checkpoint.prepare import Chunks, prepared
from mdi.checkpoint.source import Source
from mdi.cluster.delivery import Deliver, Link
from mdi.cluster.launchers.base import Launcher
from mdi.cluster.launchers.local import LocalLauncher
from mdi.cluster.launchers.manual import ManualLauncher, Waiting, starter_identity
from mdi.cluster.link import NodeAddress, PipelineSettings
from mdi.cluster.measure import measure_all
from mdi.cluster.nodes_config import NodesConfig
from mdi.cluster.remote_encoder import RemoteEncoder
from mdi.cluster.supervisor import Supervisor
from mdi.core.config import EngineConfig
from mdi.core.dtypes import dtype_name
from mdi.core.progress import Progress
from mdi.core.status import NodeStatus
from mdi.core.tracing import Span
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage
from mdi.planning.plan import make_plan
from mdi.rpc.authority import AUTHORITY_DAYS, Authority
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic


class Cluster:
    """The first stage, loaded here, and the nodes that hold the others. vision: the one that encodes images, if any.

    Chunks are prepared when there are none yet. progress: called with (node, bytes done, bytes in all). waiting: called
    with the nodes that are awaited.
    """

    def __init__(
        self,
        source: Source,
        config: EngineConfig,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        manual = config.cluster.manual
        self._nodes = nodes = NodesConfig.read(manual.nodes_config) if manual.nodes_config else None
        if nodes:
            nodes.check_layers(source.model_config.n_layers)
        self._config = config
        self._layers = nodes.layers if nodes else config.cluster.layers
        self._dtype = config.model.dtype or (nodes.starter.dtype if nodes else None)
        self._device = config.model.device or (nodes.starter.device if nodes else None) or "cpu"
        self._sequence_length = config.cache.sequence_length_for(source.model_config.max_positions)
        self._progress = progress
        self._waiting = waiting
        self.n_nodes = nodes.n_nodes if nodes else config.cluster.n_nodes
        self._supervisor: Supervisor | None = None
        self._launcher: Launcher | None = None
        self._chunks: Chunks | None = None
        self._identity: Identity | None = None
        self.vision: RemoteEncoder | None = None
        with ExitStack() as undo:
            alone = self.n_nodes == 1 and not self._vision_address
            loaded = self._load_alone(source) if alone else self._load_together(source, undo)
            self.stage = Stage(loaded, n_slots=config.cache.max_sequences, sequence_length=self._sequence_length)
            self._loaded = loaded
            undo.pop_all()

    def connect(self, deliver: Deliver) -> Link:
        """Wires the nodes together once all have loaded, and whenever some were lost. Only where there are several."""
        assert self._launcher is not None
        assert self._chunks is not None
        settings = PipelineSettings(
            self._chunks.manifest.digest, self._config.cache.max_sequences, self._sequence_length
        )
        self._supervisor = Supervisor(
            self._launcher, settings, self._config.cluster.recovery, deliver, self._progress, self._identity
        )
        return self._supervisor

    def nodes(self) -> list[NodeStatus]:
        """What every node holds and does, in pipeline order, and then spares."""
        spec = self._loaded.spec
        traffic = self._supervisor.traffic if self._supervisor else Traffic()
        here = NodeStatus(
            name="starter",
            state="ready",
            first_layer=spec.first_layer,
            last_layer=spec.last_layer,
            dtype=dtype_name(self._loaded.dtype),
            device=str(self._loaded.device),
            resident_bytes=psutil.Process().memory_info().rss,
            pid=os.getpid(),
            busy_share=self.stage.busy.share(),
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
        )
        vision = [self.vision.status()] if self.vision else []
        return [here, *(self._supervisor.status() if self._supervisor else []), *vision]

    def spans(self, record: bool) -> dict[str, list[Span]]:
        """What every node did since it was last asked, by this machine's clock. record: whether to note more.

        Raises LinkError when one does not answer.
        """
        vision = {"vision": self.vision.spans(record)} if self.vision else {}
        others = self._supervisor.spans(record) if self._supervisor else {}
        return {"starter": self.stage.recorder.take(record), **others, **vision}

    def close(self) -> None:
        """Ends every process started here. Safe to call twice; the link is closed by who asked for it."""
        if self.vision:
            self.vision.close()
        if self._launcher:
            self._launcher.close()
        if self._chunks:
            self._chunks.close()

    @property
    def _vision_address(self) -> NodeAddress | None:
        """The node that encodes images, where the starter does not."""
        node = self._nodes.vision if self._nodes else None
        return NodeAddress(node.name, node.address) if node else None

    def _load_alone(self, source: Source) -> LoadedStage:
        return load_source(source, dtype=self._dtype, device=self._device, progress=self._starter_progress())

    def _load_together(self, source: Source, undo: ExitStack) -> LoadedStage:
        cluster = self._config.cluster
        if self._nodes:
            self._identity = starter_identity(self._nodes, cluster.manual, cluster.encryption)
        chunks = self._chunks = prepared(
            source,
            self.n_nodes,
            dtype=self._dtype,
            layers=self._layers,
            vision_node=self._vision_address is not None,
            measure=lambda: self._measured_layers(source),
            progress=self._progress,
        )
        undo.callback(chunks.close)
        if self._nodes:
            self._launcher = self._await_nodes(self._nodes, chunks)
        else:
            self._launcher = self._start_nodes(chunks)
        undo.callback(self._launcher.close)
        if address := self._vision_address:
            timeout_s, width = cluster.recovery.recovery_timeout_s, source.model_config.hidden_size
            self.vision = RemoteEncoder(address, self._identity, chunks, width, timeout_s)
            undo.callback(self.vision.close)
        return load_chunk(chunks.file("starter"), device=self._device, progress=self._starter_progress())

    def _await_nodes(self, nodes: NodesConfig, chunks: Chunks) -> ManualLauncher:
        if nodes.starter.threads:
            torch.set_num_threads(nodes.starter.threads)
        manual = self._config.cluster.manual
        return ManualLauncher(nodes, manual, self._identity, chunks, self._progress, self._waiting)

    def _start_nodes(self, chunks: Chunks) -> LocalLauncher:
        """Processes here; encrypted, with certificates of an authority that lives as long as this object."""
        authority = Authority.create() if self._config.cluster.encryption else None
        self._identity = authority.issue("starter", days=AUTHORITY_DAYS) if authority else None
        threads = max(1, torch.get_num_threads() // self.n_nodes)
        files = [chunks.folder / entry.file for entry in chunks.manifest.chunks[1:]]
        dtype = chunks.manifest.dtype
        return LocalLauncher(files, dtype=dtype, device=self._device, threads=threads, authority=authority)

    def _measured_layers(self, source: Source) -> tuple[int, ...] | None:
        if self._nodes is None:
            return None
        dtype, cache = self._dtype or source.model_config.dtype, self._config.cache
        machines = measure_all(
            self._nodes, self._config.cluster.manual, self._identity, dtype, self._device, self._waiting
        )
        cache_tokens = cache.max_sequences * self._sequence_length
        made = make_plan(
            source.model_config,
            self.n_nodes,
            machines=machines,
            dtype=dtype,
            cache_tokens=cache_tokens,
            vision_node=self._vision_address is not None,
        )
        return made.layers

    def _starter_progress(self) -> Progress | None:
        progress = self._progress
        return (lambda _what, done, total: progress("starter", done, total)) if progress else None
