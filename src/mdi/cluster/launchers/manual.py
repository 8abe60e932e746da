"""The launcher for nodes that are started elsewhere: waits for them, in whatever order they come.

A node without weights, or without the right ones, is provisioned. A spare takes the place of a node that stays away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from functools import partial

from mdi.checkpoint.prepare import Chunks
from mdi.cluster.launchers.base import Died
from mdi.cluster.monitor import STATES, Monitor
from mdi.cluster.node_client import NodeAddress, NodeClient
from mdi.cluster.nodes_config import NodeConfig, NodesConfig
from mdi.cluster.provision import DamagedChunkError, provision
from mdi.core.config import ManualNodes
from mdi.core.errors import CheckpointError, ConfigError, LinkError
from mdi.core.progress import Progress
from mdi.core.status import NodeStatus
from mdi.planning.plan import VISION
from mdi.rpc import node_pb2
from mdi.rpc.channel import HEARTBEAT_S, is_loopback
from mdi.rpc.tls import VARIABLE, Identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Presence:
    """Whether a node is there, as last heard. note: what it does, or why it cannot be reached; empty before that."""

    node: NodeAddress
    there: bool
    note: str

    @property
    def missing(self) -> bool:
        """The node is waited for; spares without a role are not."""
        return not self.there and bool(self.node.role)

    @property
    def why_not_ready(self) -> str:
        remedy = ", and needs more time: see --recovery-timeout" if self.there else ""
        return f"{self.node.name}: {self.note}{remedy}"


Waiting = Callable[[Sequence[Presence]], None]
"""Called with all nodes that are waited for, whenever something about one changed."""


def starter_identity(nodes: NodesConfig, manual: ManualNodes, encryption: bool) -> Identity | None:
    """The starter's identity when links are encrypted. Raises ConfigError when they are not and have to be."""
    if encryption:
        return Identity.load(manual.certs, "starter")
    for node in nodes.all[1:]:
        if not manual.insecure and not is_loopback(node.addr):
            raise ConfigError(
                f"{node.key} is on another machine ({node.addr}), and links are not encrypted: "
                f"set {VARIABLE}=1 (see `mdi certs --help`), or allow it with --insecure"
            )
    return None


def addresses(node: NodeConfig, identity: Identity | None) -> list[NodeAddress]:
    """A node under each name that its certificate may have; under its role alone where there are no certificates."""
    return [NodeAddress(node.name, node.address, name) for name in (node.names if identity else node.names[:1])]


class ManualLauncher:
    """A `Launcher` for manual nodes: started, or back after a loss, when all answer and have their weights.

    chunks: what the nodes are to hold; None leaves them with what they have. progress: see `provision`. waiting:
    see `Waiting`.
    """

    def __init__(
        self,
        config: NodesConfig,
        manual: ManualNodes,
        monitor: Monitor,
        chunks: Chunks | None = None,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        vision = (config.vision,) if config.vision else ()
        homes = {node.name: addresses(node, monitor.identity) for node in (*config.pipeline, *vision)}
        self._homes = {name: home for name, (home, *_) in homes.items()}
        self._other_homes = {name: others for name, (_, *others) in homes.items()}
        self._spares = [replace(name, role="") for node in config.spares for name in addresses(node, monitor.identity)]
        self._places = dict(self._homes)  # where each node is: at home, or a spare in its place
        self._claimed: set[str] = set()  # spares that are being made ready
        self._manual = manual
        self._monitor = monitor
        self._chunks = chunks
        self._progress = progress
        self._waiting = waiting
        self._closed = False
        self._died: Died | None = None
        self._search: Future[None] | None = None
        self._replacing: list[Future[None]] = []

    @property
    def nodes(self) -> list[NodeAddress]:
        return [place for name, place in self._places.items() if name != VISION]

    def watch(self, died: Died) -> None:
        """Of nodes that are leaving, once a spare can take their place; the link notices all other losses."""
        self._died = died

    def start(self) -> None:
        """Raises LinkError, with what is wrong with each, when some nodes do not answer in time."""
        self._wait(list(self._homes), self._manual.wait_s, timeout_s=None)
        if self._spares:
            self._monitor.loop.call(self._watch_spares())
            self._replacing = [self._monitor.loop.begin(self._replace_when_leaving(name)) for name in self._homes]

    def dead(self) -> set[str]:
        return set()

    def restart(self, names: Collection[str], timeout_s: float) -> None:
        """Waits until these nodes have been started anew, the network reaches them again, or spares replace them."""
        try:
            self._wait(names, self._manual.spare_after_s, timeout_s)
        except CheckpointError as error:
            raise LinkError(str(error), next(iter(names))) from None

    def spares(self) -> list[NodeStatus]:
        """What was last heard of those without a place, each under the name that it answers to."""
        shown = dict[str, NodeStatus]()
        for spare in filter(self._is_free, self._spares):
            if heartbeat := self._monitor.heartbeat(spare):
                status = replace(heartbeat.shown(spare.id), spare=spare.id)
                if spare.address not in shown or status.state != "lost":
                    shown[spare.address] = status
        return list(shown.values())

    def close(self) -> None:
        """Ends a wait. The nodes go on, for the next starter."""
        self._closed = True
        for work in (self._search, *self._replacing):
            if work:
                work.cancel()

    def _wait(self, names: Collection[str], spare_after_s: float, timeout_s: float | None) -> None:
        """timeout_s: of all; None gives up when a node is missing, and no spare is there, but waits for the others."""
        search = _Search({name: Presence(self._places[name], False, "") for name in names}, self._waiting)
        self._search = self._monitor.loop.begin(self._find_all(search, spare_after_s, timeout_s))
        if self._closed:
            self._search.cancel()
        try:
            self._search.result()
        except CancelledError:
            raise LinkError("nodes are not waited for any more") from None
        if unready := [search.found[name] for name in names if name not in search.ready]:
            missing = [presence for presence in unready if presence.missing] or unready
            waited_s = spare_after_s if timeout_s is None else timeout_s
            each = "; ".join(presence.why_not_ready for presence in missing)
            raise LinkError(f"not all nodes were there within {waited_s:g} s. {each}", missing[0].node.name)

    async def _find_all(self, search: _Search, spare_after_s: float, timeout_s: float | None) -> None:
        finds = [
            asyncio.create_task(self._find(name, search, spare_after_s, give_up=timeout_s is None))
            for name in search.found
        ]
        shows = [asyncio.create_task(self._show(spare, search)) for spare in self._spares if self._is_free(spare)]
        try:
            async with asyncio.timeout(timeout_s):
                for found in asyncio.as_completed(finds):
                    if not await found:
                        return
        except TimeoutError:
            pass
        finally:
            for task in (*finds, *shows):
                task.cancel()
            await asyncio.gather(*finds, *shows, return_exceptions=True)

    async def _find(self, name: str, search: _Search, spare_after_s: float, give_up: bool) -> bool:
        """Tries all places where a node may be, until it is ready. give_up: ends it without a spare."""
        began_s, leaving = time.monotonic(), None
        while True:
            left_s = 0.0 if leaving else began_s + spare_after_s - time.monotonic()
            for place in self._candidates(name, late=left_s <= 0):
                if await self._make_ready(place, search):
                    self._places[name] = place
                    await self._forget_others(place)
                    search.ready.add(name)
                    if leaving:
                        await self._release(leaving)
                    return True
                if self._is_leaving(place) and not leaving:
                    leaving, spare_after_s = place, 0.0
                    break
            else:
                if leaving:
                    await self._release(leaving)
                    leaving = None
                if give_up and left_s <= 0:
                    return False
                await asyncio.sleep(min(HEARTBEAT_S, left_s) if left_s > 0 else HEARTBEAT_S)

    async def _make_ready(self, place: NodeAddress, search: _Search) -> bool:
        """Whether the node at a place has its weights now, or loads them. Notes why not, where it is expected."""
        expected = place == self._places[place.role]

        def note(there: bool, text: str) -> None:
            if there or expected:
                search.note(Presence(place, there, text))

        self._claimed.add(place.id)
        try:
            status = await (await self._monitor.watch(place)).usable()
            if self._chunks is None:
                note(True, STATES[status.state])
                return True
            async with NodeClient(place, self._monitor.identity) as client:
                await provision(client, place.role, self._chunks, partial(note, True), self._progress)
            return True
        except DamagedChunkError:
            raise
        except LinkError as error:
            note(False, str(error))
            return False
        finally:
            self._claimed.discard(place.id)

    def _candidates(self, name: str, late: bool) -> Iterator[NodeAddress]:
        """Where a node may be: where it was, at home, and in a spare's process, if it is late or one has its role."""
        yield self._places[name]
        for home in (self._homes[name], *self._other_homes[name]):
            if self._places[name] != home:
                yield home
        if name == VISION:
            return  # images wait for it, and nothing else does
        for spare in self._spares:
            wanted = late or self._role(spare) == name
            if wanted and self._is_free(spare) and spare.id not in self._claimed:
                yield replace(spare, role=name)

    async def _forget_others(self, found: NodeAddress) -> None:
        """A process that has been found under one of its names is not looked for under another any more."""
        for home in (self._homes[found.role], *self._other_homes[found.role]):
            if home.address == found.address and home.id != found.id:
                await self._monitor.forget(home)

    def _is_free(self, spare: NodeAddress) -> bool:
        return all(place.address != spare.address for place in self._places.values())

    def _last(self, place: NodeAddress) -> node_pb2.NodeStatus | None:
        """The answer to the last heartbeat."""
        heartbeat = self._monitor.heartbeat(place)
        return heartbeat.last.answer if heartbeat and heartbeat.last else None

    def _role(self, spare: NodeAddress) -> str:
        status = self._last(spare)
        return status.role if status else ""

    def _is_leaving(self, place: NodeAddress) -> bool:
        status = self._last(place)
        return bool(status and status.leaving)

    async def _release(self, place: NodeAddress) -> None:
        await (await self._monitor.watch(place)).client.release()

    async def _watch_spares(self) -> None:
        for spare in self._spares:
            await self._monitor.watch(spare)

    async def _show(self, spare: NodeAddress, search: _Search) -> None:
        heartbeat = await self._monitor.watch(spare)
        while True:
            try:
                role = (await heartbeat.answer()).role
                search.note(Presence(spare, True, f"a spare, last as {role}" if role else "a spare"))
            except LinkError as error:
                search.note(Presence(spare, False, str(error)))
            await asyncio.sleep(HEARTBEAT_S)

    async def _replace_when_leaving(self, name: str) -> None:
        while True:
            place = self._places[name]
            beat = await (await self._monitor.watch(place)).next()
            try:
                if beat.answer and beat.answer.leaving:
                    await self._let_leave(name, place)
            except Exception:
                log.exception("node %s could not be replaced", name)

    async def _let_leave(self, name: str, place: NodeAddress) -> None:
        """Has a spare load what a leaving node holds, and only then reports the loss; without a spare it may go."""
        if not await self._prepare_spare(name):
            await self._release(place)
        elif self._died and self._places[name] == place:
            self._died(LinkError(f"node {name} was told to end", name))

    async def _prepare_spare(self, name: str) -> bool:
        search = _Search({}, None)
        for place in self._candidates(name, late=True):
            if place == self._places[name] or not await self._make_ready(place, search):
                continue
            heartbeat = await self._monitor.watch(place)
            while (answer := (await heartbeat.next()).answer) and answer.state == node_pb2.NodeStatus.LOADING:
                pass
            if answer:
                return bool(answer.state == node_pb2.NodeStatus.LOADED)
        return False


@dataclass(frozen=True)
class _Search:
    """One wait: the nodes as they are found. ready: those that have their weights, or load them."""

    found: dict[str, Presence]
    waiting: Waiting | None
    ready: set[str] = field(default_factory=set)

    def note(self, presence: Presence) -> None:
        name = presence.node.name
        if presence != self.found.get(name):
            self.found[name] = presence
            if self.waiting:
                self.waiting(list(self.found.values()))
