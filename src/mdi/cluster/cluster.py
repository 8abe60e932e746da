"""One model over this process and other nodes, which are started or waited for, linked and watched.

Knows checkpoints, launchers and links, and no requests.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

import psutil

from mdi.checkpoint.loader import load_chunk, load_source
from mdi.checkpoint.prepare import Chunks, prepared
from mdi.checkpoint.source import Source
from mdi.cluster.cache_memory import cache_nodes
from mdi.cluster.delivery import Deliver
from mdi.cluster.launchers.base import Launcher
from mdi.cluster.launchers.local import LocalLauncher
from mdi.cluster.launchers.manual import ManualLauncher, Waiting, starter_identity
from mdi.cluster.launchers.ray import RayLauncher
from mdi.cluster.launchers.ray_placement import RayPlacement
from mdi.cluster.link import PipelineSettings, loaded_nodes
from mdi.cluster.measure import measure_all
from mdi.cluster.monitor import Monitor
from mdi.cluster.node_client import NodeAddress
from mdi.cluster.nodes_config import NodesConfig
from mdi.cluster.remote_encoder import RemoteEncoder
from mdi.cluster.supervisor import START_TIMEOUT_S, Supervisor
from mdi.cluster.wires import Wires
from mdi.core.batch import CACHE_BLOCK
from mdi.core.config import EngineConfig
from mdi.core.cores import default_threads
from mdi.core.dtypes import dtype_name
from mdi.core.group import Rank
from mdi.core.progress import Progress
from mdi.core.quantization import UNQUANTIZED
from mdi.core.status import CacheLayout, NodeRole, NodeStatus, PlanStatus
from mdi.core.tracing import Span
from mdi.kernels.library import kernels_in_use
from mdi.kernels.threads import set_threads
from mdi.models.config import ModelConfig
from mdi.models.shards import Shards
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage
from mdi.planning.cache import CacheBudget, cache_budget, planned_bytes, planned_tokens
from mdi.planning.choose import Goal, Job, choose
from mdi.planning.explain import ALONE, CHOSEN, EVEN, FOUND, GIVEN, GROUPED, explain
from mdi.planning.plan import Plan, make_plan
from mdi.rpc.authority import AUTHORITY_DAYS, Authority
from mdi.rpc.node_pb2 import NodeStatus as LoadedStatus
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic

log = logging.getLogger(__name__)


class Cluster:
    """The first stage, loaded here, and the nodes that hold the others. The one owner of all that it starts.

    plan: which node has which layers. cache: what the nodes have memory for. link: to the other nodes; None where there
    are none. encoder: of images, where the vision tower has its own node. Chunks are prepared when there are none yet.
    deliver: takes results, and what happens to the link. progress: called with (node, bytes done, bytes in all).
    waiting: called with the nodes that are waited for.
    """

    def __init__(
        self,
        source: Source,
        config: EngineConfig,
        deliver: Deliver,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        manual = config.cluster.manual
        self._nodes = nodes = NodesConfig.read(manual.nodes_config) if manual.nodes_config else None
        if nodes:
            nodes.check_layers(source.model_config.n_layers)
        self._config = config
        self._layers = nodes.layers if nodes else config.cluster.layers
        self._groups = nodes.groups if nodes else config.cluster.group_sizes
        self._dtype = config.model.dtype or (nodes.starter.dtype if nodes else None)
        self._formats = config.model.formats(source.quantization)
        self._device = config.model.device or (nodes.starter.device if nodes else None) or "cpu"
        config.cache.sequence_length_for(source.model_config.max_positions)  # refuses an impossible one at once
        Shards.of(source.model_config, config.cluster.shards)  # refuses too many
        self._progress = progress
        self._waiting = waiting
        self.link: Supervisor | None = None
        self.encoder: RemoteEncoder | None = None
        self._deliver = deliver
        self._monitor: Monitor | None = None
        self._launcher: Launcher | None = None
        self._chunks: Chunks | None = None
        self._manual: ManualLauncher | None = None
        self._ray: RayPlacement | None = None
        self._measured = False
        with ExitStack() as undo:
            undo.callback(self.close)
            if config.cluster.on_ray.ray:
                self._ray = RayPlacement.connect(config.cluster.on_ray, self._device)
            self.n_nodes = self._count_nodes(source.model_config.n_layers)
            set_threads(self._threads, self._device)
            alone = self.n_nodes == 1 and not self._vision_address
            self._loaded = self._load_alone(source) if alone else self._load_together(source)
            self.cache = self._cache_budget(source.model_config)
            self.plan = self._explained(source.model_config)
            self.stage = Stage(
                self._loaded,
                n_slots=self.cache.n_slots,
                sequence_length=self.cache.sequence_length,
                cache_dtype=config.cache.kv_cache_dtype,
                shards=self._n_shards,
            )
            if self.n_nodes > 1:
                self._connect()
            undo.pop_all()

    def nodes(self) -> list[NodeStatus]:
        """What every node holds and does, in pipeline order, then spares, then the vision node."""
        spec = self._loaded.spec
        links = self._monitor.traffic if self._monitor else Traffic()
        ranks = self._monitor.group_traffic if self._monitor else Traffic()
        here = NodeStatus(
            name="starter",
            node="starter",
            state="ready",
            first_layer=spec.first_layer,
            last_layer=spec.last_layer,
            dtype=dtype_name(self._loaded.dtype),
            device=str(self._loaded.device),
            kernels=kernels_in_use(str(self._loaded.device)),
            resident_bytes=psutil.Process().memory_info().rss,
            pid=os.getpid(),
            busy_share=self.stage.busy.share(),
            sent_bytes=links.sent_bytes + ranks.sent_bytes,
            received_bytes=links.received_bytes + ranks.received_bytes,
            group_received_bytes=ranks.received_bytes,
            steps=self.stage.steps,
            step_s=self.stage.step_s,
        )
        others = self.link.status() if self.link else []
        spares = self._manual.spares() if self._manual else []
        nodes = [here, *others, *spares, *([self.encoder.status()] if self.encoder else [])]
        return [self._placed(node, index) for index, node in enumerate(nodes)]

    @property
    def cache_layout(self) -> CacheLayout:
        """What the KV cache has memory for."""
        cache, dtype = self.cache, self._config.cache.kv_cache_dtype or dtype_name(self._loaded.dtype)
        return CacheLayout(CACHE_BLOCK, cache.tokens // CACHE_BLOCK, dtype, cache.n_slots, cache.sequence_length)

    def _placed(self, node: NodeStatus, index: int) -> NodeStatus:
        """The same with its place. index: among all, the pipeline's first."""
        node = replace(node, quantization=self._loaded.quantization)
        if index >= self.n_nodes:
            return replace(node, role="spare" if node.spare else "vision")
        role: NodeRole = "starter" if index == 0 else "finisher" if index == self.n_nodes - 1 else "secondary"
        group, rank = self._place(index)
        return replace(node, role=role, group=group, rank=rank, shards=self._ranks[index])

    @property
    def n_stages(self) -> int:
        """Stages of the pipeline: each may have several nodes."""
        return len(self._wires.stages)

    def spans(self, record: bool) -> dict[str, list[Span]]:
        """What every node did since the last call, by this machine's clock. record: whether to note more.

        Raises LinkError when one does not answer.
        """
        vision = {"vision": self.encoder.spans(record)} if self.encoder else {}
        others = self.link.spans(record) if self.link else {}
        return {"starter": self.stage.recorder.take(record), **others, **vision}

    def close(self) -> None:
        """Ends the link and every process started here. Safe to call twice."""
        if self.link:
            self.link.close()
        if self._launcher:
            self._launcher.close()
        if self._monitor:
            self._monitor.close()
        if self._ray:
            self._ray.close()
        if self._chunks:
            self._chunks.close()

    def _explained(self, model: ModelConfig) -> PlanStatus:
        dtype, quantization = dtype_name(self._loaded.dtype), self._loaded.quantization
        plan = self._chunks.manifest.plan if self._chunks else make_plan(model, 1)
        return explain(plan, model, dtype, quantization, self._reason(plan, model))

    def _reason(self, plan: Plan, model: ModelConfig) -> str:
        """Why the layers are split as they are."""
        if plan.n_machines == 1:
            return ALONE
        if self._layers:
            return GIVEN
        if self._groups:
            return GROUPED
        if self._measured:
            return CHOSEN
        alike = make_plan(model, self.n_nodes, groups=plan.groups, shards=plan.n_shards)
        return EVEN if plan.layers == alike.layers and self._nodes is None else FOUND

    @property
    def _ranks(self) -> tuple[Rank | None, ...]:
        """Of every node of the pipeline; None for one that computes its stage alone."""
        return tuple(spec.rank for spec in self._chunks.manifest.plan.stages) if self._chunks else (None,)

    @property
    def _wires(self) -> Wires:
        return Wires.of(self._ranks)

    @property
    def _n_shards(self) -> int:
        """Parts in which sums over a layer's heads and inner width are taken."""
        first = self._ranks[0]
        return first.n_shards if first else self._config.cluster.shards

    def _place(self, node: int) -> tuple[int, int]:
        """A node's stage, and its rank there."""
        places = [(group, rank) for group, stage in enumerate(self._wires.stages) for rank in range(len(stage))]
        return places[node]

    @property
    def _vision_address(self) -> NodeAddress | None:
        """The node that encodes images, where the starter does not."""
        node = self._nodes.vision if self._nodes else None
        return NodeAddress(node.name, node.address) if node else None

    @property
    def _local_threads(self) -> int:
        """Of each node that is started on this machine."""
        return max(1, default_threads() // self.n_nodes)

    @property
    def _threads(self) -> int | None:
        """Of this process. None is one for each core: the stages of a layer split take turns, and ranks do not."""
        if self._nodes:
            return self._nodes.starter.threads
        grouped = self._groups is not None and max(self._groups) > 1
        return self._local_threads if grouped and not self._ray else None

    def _count_nodes(self, n_layers: int) -> int:
        asked = self._nodes.n_nodes if self._nodes else self._config.cluster.n_nodes
        return asked or (self._ray.count_nodes(n_layers) if self._ray else 1)

    def _load_alone(self, source: Source) -> LoadedStage:
        """Weights that are to be quantised are made once, as a chunk, and read from there."""
        device, progress = self._device, self._starter_progress()
        formats = self._formats or source.quantization
        if formats == UNQUANTIZED or (formats == source.quantization and source.is_exact):
            return load_source(source, dtype=self._dtype, quantization=formats, device=device, progress=progress)
        self._chunks = prepared(source, 1, dtype=self._dtype, quantization=formats, progress=self._progress)
        return load_chunk(self._chunks.file("starter"), device=device, progress=progress)

    def _load_together(self, source: Source) -> LoadedStage:
        """Starts the other nodes, which load at the same time as this one."""
        cluster = self._config.cluster
        encrypted = not cluster.manual.insecure if self._ray else cluster.encryption
        authority = Authority.create() if encrypted and not self._nodes else None
        monitor = self._monitor = Monitor(self._identity(authority))
        chunks = self._chunks = prepared(
            source,
            self.n_nodes,
            dtype=self._dtype,
            quantization=self._formats,
            layers=self._layers,
            groups=self._groups,
            shards=cluster.shards,
            vision_node=self._vision_address is not None,
            measure=(lambda: self._measured_plan(source)) if self._nodes else None,
            progress=self._progress,
        )
        self._leave_out(chunks.manifest.plan)
        launcher = self._launcher = self._make_launcher(source.model_config, chunks, monitor, authority)
        launcher.start()
        if address := self._vision_address:
            vision = source.model_config.vision
            assert vision is not None
            width, timeout_s = vision.embedding_width, cluster.recovery.recovery_timeout_s
            self.encoder = RemoteEncoder(address, monitor, chunks, width, timeout_s)
        return load_chunk(chunks.file("starter"), device=self._device, progress=self._starter_progress())

    def _leave_out(self, plan: Plan) -> None:
        """Machines that the plan gives nothing wait as spares."""
        self.n_nodes = plan.n_nodes
        if self._nodes and plan.left_out:
            self._nodes = self._nodes.without(plan.left_out)
            log.warning(
                "%s: left out, as a spare, because the others are predicted to be faster alone; `layers` or `group` in "
                "the nodes-config uses all nodes",
                ", ".join(plan.unused),
            )

    def _connect(self) -> None:
        """Links the nodes, which have loaded. From here on the supervisor brings them back."""
        assert self._launcher and self._monitor and self._chunks  # noqa: PT018
        settings = PipelineSettings(
            self._chunks.manifest.digest,
            self.cache.n_slots,
            self.cache.sequence_length,
            self._config.cache.kv_cache_dtype,
            self._n_shards,
            ranks=self._ranks,
        )
        limits, stage = self._config.cluster.recovery, self.stage
        self.link = Supervisor(self._launcher, self._monitor, settings, limits, self._deliver, self._progress, stage)
        self.link.connect()

    def _cache_budget(self, model: ModelConfig) -> CacheBudget:
        """What all nodes have memory for. Waits until they have loaded: only then it is known what they have left."""
        nodes, statuses = list[NodeAddress](), list[LoadedStatus]()
        if self._launcher and self._monitor and self.n_nodes > 1:
            nodes, deadline = self._launcher.nodes, time.monotonic() + START_TIMEOUT_S
            statuses = self._monitor.loop.call(loaded_nodes(self._monitor, nodes, self._progress, deadline))
        stages = self._chunks.manifest.plan.stages if self._chunks else (self._loaded.spec,)
        memory = cache_nodes(self._loaded, stages, nodes, statuses, self._memory_limits())
        budget = cache_budget(model, self._config.cache, dtype_name(self._loaded.dtype), memory)
        if note := budget.note:
            log.warning("%s", note)
        return budget

    def _memory_limits(self) -> Sequence[float | None]:
        """What each node may use, in 1e9 bytes, the starter first; empty where nothing is said."""
        if self._ray:
            return [None, *self._ray.memory_gb]
        return [node.memory_gb for node in (self._nodes.starter, *self._nodes.pipeline)] if self._nodes else []

    def _identity(self, authority: Authority | None) -> Identity | None:
        """The starter's. authority: lives as long as this object, for nodes that are started here."""
        cluster = self._config.cluster
        if self._nodes:
            return starter_identity(self._nodes, cluster.manual, cluster.encryption)
        return authority.issue("starter", days=AUTHORITY_DAYS) if authority else None

    def _make_launcher(
        self, model: ModelConfig, chunks: Chunks, monitor: Monitor, authority: Authority | None
    ) -> Launcher:
        if self._ray:
            self._ray.reserve(chunks.manifest, model, self._config.cache)
            return RayLauncher(
                self._ray, chunks, monitor, authority, self._config.cluster.manual.wait_s, self._progress, self._waiting
            )
        if self._nodes:
            manual = self._config.cluster.manual
            self._manual = ManualLauncher(self._nodes, manual, monitor, chunks, self._progress, self._waiting)
            return self._manual
        files = [chunks.folder / chunk.file for chunk in chunks.manifest.chunks[1:]]
        threads = self._local_threads
        dtype, device = chunks.manifest.dtype, self._device
        return LocalLauncher(files, dtype=dtype, device=device, threads=threads, authority=authority)

    def _measured_plan(self, source: Source) -> Plan:
        assert self._nodes and self._monitor  # noqa: PT018
        self._measured = True
        model, cache = source.model_config, self._config.cache
        dtype = self._dtype or model.dtype
        formats, manual = self._formats or source.quantization, self._config.cluster.manual
        machines, links = measure_all(self._nodes, manual, self._monitor, dtype, formats, self._device, self._waiting)
        job = Job(
            model,
            dtype,
            formats,
            optimize=cast("Goal", self._config.cluster.optimize),
            cache_tokens=planned_tokens(cache, model.max_positions),
            most_cache_bytes=planned_bytes(cache),
            cache_dtype=cache.kv_cache_dtype,
            vision_node=self._vision_address is not None,
            shards=self._config.cluster.shards,
        )
        if self._layers or self._groups:
            return job.plan(machines, self._groups or (1,) * self.n_nodes, self._layers)
        return choose(job, machines, links).best.plan

    def _starter_progress(self) -> Progress | None:
        progress = self._progress
        return (lambda _what, done, total: progress("starter", done, total)) if progress else None
