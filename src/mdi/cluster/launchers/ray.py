"""The launcher for nodes that Ray places: a placement group, and an actor for each node that supervises its process.

Ray decides where nodes run, and shows them. Batches go over our own links, weights by our own provisioning.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from mdi.checkpoint.prepare import Chunks
from mdi.cluster.launchers.base import Died
from mdi.cluster.launchers.manual import Presence, Waiting
from mdi.cluster.launchers.ray_actor import NodeActor
from mdi.cluster.launchers.ray_bundles import shown, shown_rooms, without_room
from mdi.cluster.launchers.ray_cluster import imported
from mdi.cluster.launchers.ray_placement import RayPlacement
from mdi.cluster.monitor import Monitor
from mdi.cluster.node_client import NodeAddress, NodeClient
from mdi.cluster.provision import DamagedChunkError, provision
from mdi.core.errors import CheckpointError, LinkError
from mdi.core.progress import Progress
from mdi.rpc.authority import AUTHORITY_DAYS, Authority

log = logging.getLogger(__name__)

POLL_S = 0.2
START_TIMEOUT_S = 120.0  # of a node's process, whose machine may read torch from a slow disk
PATIENCE_S = 2.0  # of a placement, before it is shown that it waits
OWN_ACTOR = ("CPU", "GPU", "memory")  # resources that an actor names on their own


class RayLauncher:
    """A `Launcher` of a node for each bundle of a placement. With an authority their links are encrypted.

    chunks: what the nodes are to hold. wait_s: for room on the cluster. progress: see `provision`. waiting: called with
    the nodes that are waited for.
    """

    def __init__(
        self,
        placement: RayPlacement,
        chunks: Chunks,
        monitor: Monitor,
        authority: Authority | None,
        wait_s: float,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        self._placement = placement
        self._bundles = {bundle.role: bundle for bundle in placement.bundles}
        self._wait_s = wait_s
        self._name = f"mdi {Path(chunks.manifest.model).name} {uuid.uuid4().hex[:6]}"  # one of several servers
        self._chunks = chunks
        self._monitor = monitor
        self._authority = authority
        self._progress = progress
        self._waiting = waiting
        self._lock = threading.Lock()
        self._closing = False
        self._died: Died | None = None
        self._group: Any = None
        self._actors: dict[str, Any] = {}
        self._ends: dict[str, Any] = {}  # of the processes that run: references to what `NodeActor.ended` returns
        self._sending: dict[str, Future[None]] = {}  # weights
        self._dead: set[str] = set()
        self._addresses: dict[str, str] = {}
        self._notes: dict[str, Presence] = {}

    @property
    def nodes(self) -> list[NodeAddress]:
        return [NodeAddress(role, self._addresses[role]) for role in self._bundles]

    def watch(self, died: Died) -> None:
        self._died = died

    def start(self) -> None:
        """Raises LinkError when there is no room, or a node does not come up, in time."""
        self._place()
        self._bring_up(self._bundles, START_TIMEOUT_S)

    def dead(self) -> set[str]:
        with self._lock:
            return set(self._dead)

    def restart(self, names: Collection[str], timeout_s: float) -> None:
        """Starts the processes of these nodes anew; Ray places an actor elsewhere whose machine is lost."""
        self._bring_up(names, timeout_s)

    def close(self) -> None:
        with self._lock:
            self._closing = True
            actors, self._actors = self._actors, {}
            group, self._group = self._group, None
            sending = list(self._sending.values())
        for transfer in sending:
            transfer.cancel()
        ray = imported()
        for actor in actors.values():
            ray.kill(actor)
        if group is not None:
            ray.util.remove_placement_group(group)

    def _place(self) -> None:
        """Waits until Ray has reserved all bundles."""
        from ray.util.placement_group import placement_group

        placing = self._placement.placing
        bundles = list(self._bundles.values())
        self._group = placement_group(
            [dict(bundle.amounts) for bundle in bundles],
            strategy=placing.strategy,
            name=self._name,
            bundle_label_selector=[placing.selectors] * len(bundles),
        )
        began_s = time.monotonic()
        while not self._group.wait(POLL_S):
            waited_s = time.monotonic() - began_s
            if self._closing or waited_s > self._wait_s:
                raise LinkError(f"{self._without_room()}; it was not there within {self._wait_s:g} s (--wait-s)")
            if waited_s > PATIENCE_S:
                for role in self._bundles:
                    self._note(role, False, self._without_room())

    def _without_room(self) -> str:
        """What is waited for, and what is there."""
        allowed, bundles = self._placement.machines(), list(self._bundles.values())
        rooms = [machine.free for machine in allowed]
        lacking = without_room(bundles, rooms, self._placement.placing) or bundles[0]
        return (
            f"Ray has no room yet for {len(bundles)} nodes: {lacking.role} needs {shown(lacking.amounts)}, and free "
            f"are {shown_rooms(lacking, allowed, free=True)}"
        )

    def _bring_up(self, names: Collection[str], timeout_s: float) -> None:
        """All at the same time. Raises the LinkError of one that does not come up."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            for name in names:
                self._ends.pop(name, None)  # what ends from now on is meant to
        with ThreadPoolExecutor(max(1, len(names)), "mdi-ray") as pool:
            for done in [pool.submit(self._start_node, name, deadline) for name in names]:
                done.result()

    def _start_node(self, role: str, deadline: float) -> None:
        self._note(role, False, "starts")
        certificate, authority = None, b""
        if self._authority:
            request = self._call(role, "certificate_request", deadline=deadline)
            certificate = self._authority.sign(role, request, days=AUTHORITY_DAYS)
            authority = self._authority.pem
        left_s = max(1.0, deadline - time.monotonic())
        options = self._options(role)
        address, error = self._call(role, "run", options, certificate, authority, left_s, deadline=deadline)
        if error:
            self._mark_dead(role)
            raise LinkError(error, role)
        self._addresses[role] = address
        self._watch(role)
        self._provision(role, deadline)

    def _options(self, role: str) -> list[str]:
        """Of `mdi secondary`. Ray shows each node its own GPUs, so their numbers do not count."""
        options = ["--role", role, "--threads", str(self._bundles[role].threads)]
        options += ["--dtype", self._chunks.manifest.dtype, "--device", self._placement.device.partition(":")[0]]
        return options if self._authority else [*options, "--insecure"]

    def _watch(self, role: str) -> None:
        reference = self._actor(role).ended.options(name=f"{role} runs").remote()
        with self._lock:
            self._dead.discard(role)
            self._ends[role] = reference
        reference.future().add_done_callback(partial(self._report, role, reference))

    def _report(self, role: str, reference: Any, end: Future[str]) -> None:
        """From a thread of Ray: a process has ended, or its actor."""
        with self._lock:
            if self._closing or self._ends.get(role) is not reference:
                return
            self._dead.add(role)
        error = end.exception()
        reason = f"the Ray actor of node {role} ended: {_in_short(error)}" if error else end.result()
        if self._died:
            self._died(LinkError(reason, role))

    def _mark_dead(self, role: str) -> None:
        with self._lock:
            self._dead.add(role)

    def _call(self, role: str, method: str, *arguments: Any, deadline: float) -> Any:
        """Calls an actor; one that is lost is placed anew. Raises LinkError when it does not answer in time."""
        ray = imported()
        reason = "its actor has not answered yet"
        while True:
            try:
                reference = getattr(self._actor(role), method).remote(*arguments)
                while True:
                    try:
                        return ray.get(reference, timeout=POLL_S)
                    except ray.exceptions.GetTimeoutError:
                        self._check(role, deadline, reason)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    raise LinkError(_broken(role, error), role) from None
                reason = f"its actor ended: {_in_short(error)}"
                self._forget(role)
            except ray.exceptions.ActorAlreadyExistsError:
                reason = "its last actor does not end"
            self._check(role, deadline, reason)
            time.sleep(POLL_S)

    def _check(self, role: str, deadline: float, reason: str) -> None:
        if self._closing:
            raise LinkError("the nodes are being ended", role)
        if time.monotonic() > deadline:
            raise LinkError(f"node {role} did not start in time: {reason}", role)

    def _actor(self, role: str) -> Any:
        """The node's actor, in its bundle; made anew after a loss."""
        with self._lock:
            if self._closing:
                raise LinkError("the nodes are being ended", role)
            if role not in self._actors:
                self._actors[role] = self._make_actor(role)
            return self._actors[role]

    def _make_actor(self, role: str) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        amounts = self._bundles[role].amounts
        return (
            imported()
            .remote(NodeActor)
            .options(
                name=f"{self._name} {role}",
                num_cpus=amounts.get("CPU", 0),
                num_gpus=amounts.get("GPU", 0),
                memory=amounts.get("memory", 0),
                resources={name: amount for name, amount in amounts.items() if name not in OWN_ACTOR},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=list(self._bundles).index(role)
                ),
                max_concurrency=8,
            )
            .remote(role)
        )

    def _forget(self, role: str) -> None:
        """Gives up a lost actor, which is not to come back."""
        with self._lock:
            actor = self._actors.pop(role, None)
        if actor is not None:
            imported().kill(actor)

    def _provision(self, role: str, deadline: float) -> None:
        """Returns when the node has its weights, or loads them."""
        place = NodeAddress(role, self._addresses[role])
        while True:
            try:
                left_s = max(POLL_S, deadline - time.monotonic())
                sending = self._monitor.loop.begin(asyncio.wait_for(self._make_ready(place), left_s))
                with self._lock:
                    self._sending[role] = sending
                if self._closing:
                    sending.cancel()
                sending.result()
                return
            except CancelledError:
                raise LinkError("the nodes are being ended", role) from None
            except TimeoutError:
                raise LinkError(f"node {role} needs more time for its weights: see --recovery-timeout", role) from None
            except DamagedChunkError:
                raise
            except CheckpointError as error:
                raise LinkError(str(error), role) from None
            except LinkError as error:
                if role in self.dead():
                    raise
                self._note(role, False, str(error))
                self._check(role, deadline, str(error))
                time.sleep(POLL_S)

    async def _make_ready(self, place: NodeAddress) -> None:
        await (await self._monitor.watch(place)).usable()
        async with NodeClient(place, self._monitor.identity) as client:
            note: Callable[[str], None] = partial(self._note, place.role, True)
            await provision(client, place.role, self._chunks, note, self._progress)

    def _note(self, role: str, there: bool, text: str) -> None:
        """Shows what a node does: here, and in the log of its actor."""
        presence = Presence(NodeAddress(role, self._addresses.get(role, "on Ray")), there, text)
        with self._lock:
            if self._notes.get(role) == presence:
                return
            self._notes[role] = presence
            shown_now, actor = list(self._notes.values()), self._actors.get(role)
        if self._waiting:
            self._waiting(shown_now)
        if actor is not None:
            actor.note.options(name=f"{role} {text}").remote(text)


def _in_short(error: BaseException) -> str:
    """The first sentence of what Ray says."""
    return str(error).strip().split("\n", 1)[0][:300]


def _broken(role: str, error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"node {role} cannot run on the machine that Ray gave it ({lines[-1][:300]}): install the same mdi-llm there"
