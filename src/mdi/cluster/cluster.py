"""One model over this process and its nodes: the first stage here, the others started or awaited, linked and watched.

Knows checkpoints, launchers and links; nothing of requests.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mdi.checkpoint.loader import load_chunk, load_source
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import chunk_folder, prepare
from mdi.checkpoint.source import Source
from mdi.cluster.delivery import Deliver, Link
from mdi.cluster.launchers.base import Launcher
from mdi.cluster.launchers.local import LocalLauncher
from mdi.cluster.launchers.manual import ManualLauncher, ManualNodes
from mdi.cluster.link import NodeAddress, PipelineSettings
from mdi.cluster.measure import measure_all
from mdi.cluster.node_client import Chunks
from mdi.cluster.recovery import RecoveryLimits
from mdi.cluster.remote_encoder import RemoteEncoder
from mdi.cluster.supervisor import Supervisor
from mdi.core.dtypes import dtype_name
from mdi.core.errors import CheckpointError
from mdi.core.progress import Progress
from mdi.core.status import NodeStatus
from mdi.core.tracing import Span
from mdi.models.stage import LoadedStage, Stage
from mdi.planning.plan import make_plan
from mdi.rpc.authority import AUTHORITY_DAYS, Authority
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic


@dataclass(frozen=True)
class ClusterConfig:
    """How a model is spread. layers: per node, overriding the plan. dtype: the checkpoint's own if None.

    encryption: of all links. manual_nodes: the nodes are started by hand; None starts them here.
    """

    n_nodes: int
    layers: tuple[int, ...] | None
    dtype: str | None
    device: str
    n_slots: int
    sequence_length: int
    recovery: RecoveryLimits
    encryption: bool = False
    manual_nodes: ManualNodes | None = None

    @property
    def vision(self) -> NodeAddress | None:
        """The node that encodes images, where the starter does not."""
        node = self.manual_nodes.config.vision if self.manual_nodes else None
        return NodeAddress(node.name, node.address) if node else None


class Cluster:
    """The first stage, loaded here, and the nodes that hold the others. vision: the one that encodes images, if any.

    Chunks are prepared when there are none yet. progress: told (node, bytes done, bytes in all).
    """

    def __init__(self, source: Source, config: ClusterConfig, progress: Progress | None = None) -> None:
        self._config = config
        self._progress = progress
        self._supervisor: Supervisor | None = None
        self._launcher: Launcher | None = None
        self._identity: Identity | None = None
        self.vision: RemoteEncoder | None = None
        with ExitStack() as undo:
            loaded = (
                self._load_together(source, undo) if config.n_nodes > 1 or config.vision else self._load_alone(source)
            )
            self.stage = Stage(loaded, n_slots=config.n_slots, sequence_length=config.sequence_length)
            self._loaded = loaded
            undo.pop_all()

    def connect(self, deliver: Deliver) -> Link:
        """Wires the nodes together once all have loaded, and whenever some were lost. Only where there are several."""
        assert self._launcher is not None
        settings = PipelineSettings(self._manifest_digest, self._config.n_slots, self._config.sequence_length)
        self._supervisor = Supervisor(
            self._launcher, settings, self._config.recovery, deliver, self._progress, self._identity
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

    def _load_alone(self, source: Source) -> LoadedStage:
        return load_source(
            source, dtype=self._config.dtype, device=self._config.device, progress=self._starter_progress()
        )

    def _load_together(self, source: Source, undo: ExitStack) -> LoadedStage:
        config = self._config
        if config.manual_nodes:
            self._identity = config.manual_nodes.identity(config.encryption)
        folder = self._prepared(source)
        manifest = Manifest.read(folder)
        self._manifest_digest = manifest.digest
        chunks = [folder / chunk.file for chunk in manifest.chunks]
        if config.manual_nodes:
            self._launcher = self._await_nodes(config.manual_nodes, Chunks(folder, manifest))
        else:
            self._launcher = self._start_nodes(chunks[1:], manifest.dtype)
        undo.callback(self._launcher.close)
        if config.vision:
            timeout_s, width = config.recovery.timeout_s, source.model_config.hidden_size
            self.vision = RemoteEncoder(config.vision, self._identity, Chunks(folder, manifest), width, timeout_s)
            undo.callback(self.vision.close)
        return load_chunk(chunks[0], device=config.device, dtype=config.dtype, progress=self._starter_progress())

    def _await_nodes(self, manual_nodes: ManualNodes, chunks: Chunks) -> ManualLauncher:
        if manual_nodes.config.starter.threads:
            torch.set_num_threads(manual_nodes.config.starter.threads)
        return ManualLauncher(manual_nodes, self._identity, chunks, self._progress)

    def _start_nodes(self, chunks: list[Path], dtype: str) -> LocalLauncher:
        """Processes here; encrypted, with certificates of an authority that lives as long as this object."""
        config = self._config
        authority = Authority.create() if config.encryption else None
        self._identity = authority.issue("starter", days=AUTHORITY_DAYS) if authority else None
        threads = max(1, torch.get_num_threads() // config.n_nodes)
        return LocalLauncher(chunks, dtype=dtype, device=config.device, threads=threads, authority=authority)

    def _prepared(self, source: Source) -> Path:
        """The chunks' folder, written now if not there. Chunks of another plan or dtype are refused, not replaced.

        Nodes started by hand are awaited and measured first, unless somebody has decided on their layers.
        """
        config = self._config
        folder = chunk_folder(source.path, config.n_nodes, vision_node=config.vision is not None)
        if not folder.exists():
            return prepare(
                source,
                config.n_nodes,
                dtype=config.dtype,
                layers=config.layers or self._measured_layers(source),
                vision_node=config.vision is not None,
                progress=self._progress,
            )
        manifest = Manifest.read(folder)
        wanted = make_plan(source.model_config, config.n_nodes, config.layers, vision_node=config.vision is not None)
        if config.layers and manifest.plan != wanted:
            raise CheckpointError(
                f"the chunks in {str(folder)!r} were split {_commas(manifest.plan.layers)}, "
                f"not {_commas(wanted.layers)}: "
                f"run `mdi prepare --n-nodes {config.n_nodes} --layers {_commas(wanted.layers)}`"
            )
        if config.dtype and manifest.dtype != config.dtype:
            raise CheckpointError(
                f"the chunks in {str(folder)!r} are {manifest.dtype}, not {config.dtype}: "
                f"run `mdi prepare --n-nodes {config.n_nodes} --dtype {config.dtype}`"
            )
        return folder

    def _measured_layers(self, source: Source) -> tuple[int, ...] | None:
        config, dtype = self._config, self._config.dtype or source.model_config.dtype
        if config.manual_nodes is None:
            return None
        machines = measure_all(config.manual_nodes, self._identity, dtype, config.device)
        cache_tokens = config.n_slots * config.sequence_length
        made = make_plan(
            source.model_config,
            config.n_nodes,
            machines=machines,
            dtype=dtype,
            cache_tokens=cache_tokens,
            vision_node=config.vision is not None,
        )
        return made.layers

    def _starter_progress(self) -> Progress | None:
        progress = self._progress
        return (lambda _what, done, total: progress("starter", done, total)) if progress else None


def _commas(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
