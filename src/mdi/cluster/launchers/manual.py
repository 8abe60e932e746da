"""Nodes that somebody starts on other machines: awaited, in whatever order they come. Starts and ends none of them.

Who has no weights, or not the right ones, is sent them. A spare takes the place of one that does not come back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mdi.checkpoint.prepare import Chunks
from mdi.cluster.launchers.base import Died
from mdi.cluster.link import NodeAddress, node_status
from mdi.cluster.node_client import POLL_S, Visit, Visitor
from mdi.cluster.nodes_config import NodesConfig
from mdi.core.config import ManualNodes
from mdi.core.errors import CheckpointError, ConfigError, LinkError
from mdi.core.progress import Progress
from mdi.core.status import NodeStatus
from mdi.planning.plan import VISION
from mdi.rpc import node_pb2
from mdi.rpc.channel import is_loopback
from mdi.rpc.tls import VARIABLE, Identity

CLOSED_POLL_S = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Presence:
    """Whether a node is there, as last seen. note: what it does, or why it cannot be reached; empty before that."""

    node: NodeAddress
    there: bool
    note: str

    @property
    def missing(self) -> bool:
        """It is waited for; spares without a role are not."""
        return not self.there and self.node.name != self.node.spare

    @property
    def why_not_ready(self) -> str:
        remedy = ", and needs more time: see --recovery-timeout" if self.there else ""
        return f"{self.node.name}: {self.note}{remedy}"


Waiting = Callable[[Sequence[Presence]], None]
"""Told of all awaited nodes, whenever something about one changed."""


Watch = Callable[[], Coroutine[Any, Any, None]]


def starter_identity(nodes: NodesConfig, manual: ManualNodes, encryption: bool) -> Identity | None:
    """The starter's identity when links are encrypted. Raises ConfigError when they are not and would have to be."""
    if encryption:
        return Identity.load(manual.certs, "starter")
    for node in nodes.all[1:]:
        if not manual.insecure and not is_loopback(node.addr):
            raise ConfigError(
                f"{node.key} is on another machine ({node.addr}), and links are not encrypted: "
                f"set {VARIABLE}=1 (see `mdi certs --help`), or allow it with --insecure"
            )
    return None


class ManualLauncher:
    """A `Launcher` for nodes started by hand: made, or back after a loss, when all answer and have their weights.

    chunks: what they are to hold; None leaves them with what they have. progress: see `Visitor`. waiting: called with
    who is there.
    Raises LinkError, with what is wrong with each, when some do not answer in time.
    """

    def __init__(
        self,
        config: NodesConfig,
        manual: ManualNodes,
        identity: Identity | None,
        chunks: Chunks | None = None,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        vision = (config.vision,) if config.vision else ()
        self._homes = {node.name: NodeAddress(node.name, node.address) for node in (*config.pipeline, *vision)}
        self._spares = [NodeAddress(node.name, node.address, spare=node.name) for node in config.spares]
        self._places = dict(self._homes)  # where each node is: at home, or a spare in its place
        self._claimed: set[str] = set()  # spares that are being made ready
        self._seen: dict[str, NodeStatus] = {}  # spares without a place
        self._roles: dict[str, str] = {}  # what spares say they are
        self._visitor = Visitor(identity, chunks, progress)
        self._spare_after_s = manual.spare_after_s
        self._waiting = waiting
        self._closed = threading.Event()
        self._restarts: Counter[str] = Counter()
        self._died: Died | None = None
        self._wait(list(self._homes), manual.wait_s, timeout_s=None)
        self._watcher = threading.Thread(target=lambda: asyncio.run(self._watch()), name="mdi-spares", daemon=True)
        if self._spares:
            self._watcher.start()

    @property
    def nodes(self) -> list[NodeAddress]:
        return [place for name, place in self._places.items() if name != VISION]

    def watch(self, died: Died) -> None:
        """Of nodes that were told to end, once a spare can take their place; the links notice all other losses."""
        self._died = died

    def dead(self) -> set[str]:
        return set()

    def restart(self, names: Collection[str], timeout_s: float) -> None:
        """Waits until somebody has started these nodes anew, the network reaches them again, or spares replace them."""
        self._restarts.update(names)
        try:
            self._wait(names, self._spare_after_s, timeout_s)
        except CheckpointError as error:
            raise LinkError(str(error), next(iter(names))) from None

    def restarts(self, name: str) -> int:
        return self._restarts[name]

    def spares(self) -> list[NodeStatus]:
        """What was last heard of those without a place."""
        return [self._seen[spare.name] for spare in self._spares if self._is_free(spare) and spare.name in self._seen]

    def close(self) -> None:
        """Ends a wait. The nodes stay, for the next who serves with them."""
        self._closed.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _wait(self, names: Collection[str], spare_after_s: float, timeout_s: float | None) -> None:
        """timeout_s: of all; None gives up when nobody is there, not even a spare, but waits for who is."""
        search = _Search({name: Presence(self._places[name], False, "") for name in names}, self._waiting)
        asyncio.run(self._find_all(search, spare_after_s, timeout_s))
        if self._closed.is_set():
            raise LinkError("nodes are not waited for any more")
        if unready := [search.found[name] for name in names if name not in search.ready]:
            missing = [presence for presence in unready if presence.missing] or unready
            waited_s = spare_after_s if timeout_s is None else timeout_s
            each = "; ".join(presence.why_not_ready for presence in missing)
            raise LinkError(f"not all nodes were there within {waited_s:g} s. {each}", missing[0].node.name)

    async def _find_all(self, search: _Search, spare_after_s: float, timeout_s: float | None) -> None:
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        searches = {
            asyncio.create_task(self._find(name, search, spare_after_s, give_up=timeout_s is None))
            for name in search.found
        }
        looks = {asyncio.create_task(self._show_spare(spare, search)) for spare in self._spares if self._is_free(spare)}
        found = True
        pending = searches
        while pending and found and not self._closed.is_set() and time.monotonic() < deadline_s:
            left_s = min(CLOSED_POLL_S, deadline_s - time.monotonic())
            done, pending = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            found = all(not task.exception() and task.result() for task in done)
        for task in searches | looks:
            task.cancel()
        for outcome in await asyncio.gather(*searches, *looks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _find(self, name: str, search: _Search, spare_after_s: float, give_up: bool) -> bool:
        """Looks for a node wherever it may be, until it is ready. give_up: False when no spare is there, too."""
        began_s, leaving = time.monotonic(), None
        while True:
            left_s = 0.0 if leaving else began_s + spare_after_s - time.monotonic()
            for place in self._candidates(name, late=left_s <= 0):
                visit = await self._visit(place, search)
                if visit is Visit.LEAVING and not leaving:
                    leaving, spare_after_s = place, 0.0
                    break
                if visit is Visit.READY:
                    self._places[name] = place
                    search.ready.add(name)
                    if leaving:
                        await self._visitor.release(leaving)
                    return True
            else:
                if leaving:
                    await self._visitor.release(leaving)
                    leaving = None
                if give_up and left_s <= 0:
                    return False
                await asyncio.sleep(min(POLL_S, left_s) if left_s > 0 else POLL_S)

    async def _visit(self, place: NodeAddress, search: _Search) -> Visit:
        expected = place == self._places[place.name]

        def note(there: bool, text: str) -> None:
            if there or expected:
                search.note(Presence(place, there, text))

        self._claimed.add(place.spare)
        try:
            return await self._visitor.visit(place, note)
        finally:
            self._claimed.discard(place.spare)

    def _candidates(self, name: str, late: bool) -> Iterator[NodeAddress]:
        """Where a node may be: where it was, at home, and in a spare's process, if it is late or one says so."""
        yield self._places[name]
        if self._places[name] != self._homes[name]:
            yield self._homes[name]
        if name == VISION:
            return  # images wait for it, and nothing else does
        for spare in self._spares:
            wanted = late or self._roles.get(spare.name) == name
            if wanted and self._is_free(spare) and spare.name not in self._claimed:
                yield replace(spare, name=name)

    def _is_free(self, spare: NodeAddress) -> bool:
        return all(place.spare != spare.spare for place in self._places.values())

    async def _show_spare(self, spare: NodeAddress, search: _Search) -> None:
        while True:
            search.note(await self._look_at(spare))
            await asyncio.sleep(POLL_S)

    async def _look_at(self, spare: NodeAddress) -> Presence:
        asked_s = time.monotonic()
        status = await self._visitor.look(spare)
        if isinstance(status, str):
            self._roles.pop(spare.name, None)
            self._seen[spare.name] = NodeStatus(spare.name, "lost", 0, 0, "", "", 0, 0, 0.0, 0, 0, spare=spare.name)
            return Presence(spare, False, status)
        self._roles[spare.name] = status.name
        self._seen[spare.name] = node_status(status, spare.name, time.monotonic() - asked_s)
        return Presence(spare, True, "a spare" if status.name == spare.name else f"a spare, last as {status.name}")

    async def _watch(self) -> None:
        """Keeps an eye on spares, and on nodes that want to leave, until `close`."""
        watched: list[Watch] = [self._look_at_free_spares, *(partial(self._let_leave, name) for name in self._homes)]
        tasks = [asyncio.create_task(self._again_and_again(watch)) for watch in watched]
        while not self._closed.is_set():
            await asyncio.sleep(CLOSED_POLL_S)
        for task in tasks:
            task.cancel()

    async def _again_and_again(self, watch: Watch) -> None:
        while True:
            try:
                await watch()
            except Exception:
                log.exception("the nodes could not be watched")
            await asyncio.sleep(POLL_S)

    async def _look_at_free_spares(self) -> None:
        await asyncio.gather(*(self._look_at(spare) for spare in self._spares if self._is_free(spare)))

    async def _let_leave(self, name: str) -> None:
        """Has a spare load what a leaving node holds, and only then reports the loss; without a spare it may go."""
        place = self._places[name]
        status = await self._visitor.look(place)
        if isinstance(status, str) or not status.leaving:
            return
        if not await self._prepare_spare(name):
            await self._visitor.release(place)
        elif self._died and self._places[name] == place:
            self._died(LinkError(f"node {name} was told to end", name))

    async def _prepare_spare(self, name: str) -> bool:
        search = _Search({}, None)
        for place in self._candidates(name, late=True):
            if place != self._places[name] and await self._visit(place, search) is Visit.READY:
                while not isinstance(status := await self._visitor.look(place), str):
                    if status.state != node_pb2.NodeStatus.LOADING:
                        return bool(status.state == node_pb2.NodeStatus.LOADED)
                    await asyncio.sleep(POLL_S)
        return False


@dataclass(frozen=True)
class _Search:
    """One wait: who was found, and in which state. ready: has its weights."""

    found: dict[str, Presence]
    waiting: Waiting | None
    ready: set[str] = field(default_factory=set)

    def note(self, presence: Presence) -> None:
        name = presence.node.name
        if presence != self.found.get(name):
            self.found[name] = presence
            if self.waiting:
                self.waiting(list(self.found.values()))
