"""The life of a node: waiting, receiving, loading, loaded, leaving. One object owns that state.

A node holds the chunk it was started with, or the one that the starter offers: from the cache, or sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from mdi.checkpoint.loader import load_chunk
from mdi.checkpoint.manifest import ChunkEntry, Manifest
from mdi.core.dtypes import dtype_name, parse_dtype
from mdi.core.errors import CheckpointError, LinkError, MDIError
from mdi.kernels.library import kernels_in_use
from mdi.models.weights import LoadedStage
from mdi.node.settings import NodeSettings
from mdi.node.store import ChunkStore, StoredChunk
from mdi.node.weights import Intake
from mdi.rpc import node_pb2
from mdi.rpc.channel import HEARTBEAT_S, MISSED_BEATS
from mdi.rpc.tls import NODE_NAME

log = logging.getLogger(__name__)

State = node_pb2.NodeStatus


class Lifecycle:
    """What a node holds, and how far it is with that. All methods belong to the event loop.

    drop: called, and waited for, before another chunk takes the place of the one that is loaded.
    """

    def __init__(self, settings: NodeSettings, drop: Callable[[], Awaitable[None]]) -> None:
        self.node = settings.name
        self.role = settings.role
        self.loaded: LoadedStage | None = None
        self.manifest_digest = ""
        self.error = ""
        self._settings = settings
        self._drop = drop
        self._sha256 = ""  # of the chunk that is loaded, or is verified and being loaded
        self._loading = False
        self._damaged = ""  # why the chunk that was sent cannot be used
        self._progress = (0, 0)
        self._intake = Intake()
        self._store = ChunkStore(settings.cache) if settings.cache else None
        self._offering = asyncio.Lock()
        self._last_status_s = -math.inf
        self._released: Callable[[], None] | None = None

    def start(self, failed: Callable[[], None]) -> None:
        """Starts to load the chunk, if there is one. failed: called when a chunk cannot be loaded."""
        self._loop = asyncio.get_running_loop()
        self._failed = failed
        if self._settings.chunk:
            self._load(self._settings.chunk)

    async def stop(self) -> None:
        """Ends a transfer, and releases the chunk."""
        await self._intake.stop()
        if self._store:
            self._store.close()

    def status(self) -> node_pb2.NodeStatus:
        """The part of a node's status that is known here. Notes that the starter polls."""
        self._last_status_s = time.monotonic()
        done, total = self._progress
        status = State(
            state=self._state(),
            error=self.error,
            done_bytes=done,
            total_bytes=total,
            node=self.node,
            role=self.role,
            device=self._settings.device,
            kernels=kernels_in_use(self._settings.device),
            manifest_digest=self.manifest_digest,
            leaving=self._released is not None,
        )
        if self.loaded:
            status.first_layer, status.last_layer = self.loaded.spec.first_layer, self.loaded.spec.last_layer
            status.dtype = dtype_name(self.loaded.dtype)
        return status

    def holding(self, manifest_digest: str) -> LoadedStage:
        """The loaded stage of this manifest. Raises LinkError when there is none, or one of another."""
        if self.loaded is None or self.manifest_digest != manifest_digest:
            raise LinkError(self.error or "does not have these weights, or is still loading them")
        return self.loaded

    async def offer(self, manifest: Manifest, role: str) -> node_pb2.OfferReply:
        """Takes a role: has its chunk, loads it from the cache, or wants it sent.

        Raises CheckpointError when this node cannot take it.
        """
        async with self._offering:
            chunk = self._place(manifest, role)
            if self._sha256 == chunk.entry.sha256:
                self.role, self.manifest_digest = role, manifest.digest
                return node_pb2.OfferReply(ready=True)
            if self._loading:
                return node_pb2.OfferReply()
            await self._drop()
            self.loaded, self._sha256, self.manifest_digest, self.role = None, "", "", role
            if self._damaged:
                error, self._damaged = self._damaged, ""
                return node_pb2.OfferReply(damaged=True, error=error)
            have_bytes = await self._intake.expect(chunk)
            if chunk.complete:
                self._load(chunk.path, chunk)
                return node_pb2.OfferReply()
            return node_pb2.OfferReply(wanted=True, have_bytes=have_bytes)

    async def receive(self, pieces: AsyncIterator[node_pb2.WeightsPiece]) -> None:
        """Receives the chunk that was offered, and starts to load it when all of it is there.

        Raises CheckpointError when the disk refuses, LinkError for bytes that are no pieces.
        """
        chunk = await self._intake.receive(pieces, self._show)
        if chunk:
            self._load(chunk.path, chunk)

    def leave(self, released: Callable[[], None]) -> bool:
        """Reports from now on that this node is about to end. False when no starter polls it, or the second time.

        released: called when another node has taken its place, or none can.
        """
        polled = time.monotonic() - self._last_status_s < MISSED_BEATS * HEARTBEAT_S
        if not polled or self._released:
            return False
        self._released = released
        return True

    def release(self) -> None:
        """Ends a node that is leaving, after the answer to this call."""
        if self._released:
            self._loop.call_soon(self._released)

    def _state(self) -> State.State:
        if self.error:
            return State.FAILED
        if self.loaded:
            return State.LOADED
        if self._loading:
            return State.LOADING
        return State.RECEIVING if self._intake.receiving else State.WAITING

    def _place(self, manifest: Manifest, role: str) -> StoredChunk:
        """Where the role's chunk is kept. Raises CheckpointError when this node cannot take it."""
        settings = self._settings
        if not NODE_NAME.fullmatch(role) or settings.role not in ("", role):
            raise CheckpointError(f"is {self.node}, and cannot be {role}")
        if self._store is None:
            raise CheckpointError("was started for its own chunk alone: start it with --nodes-config")
        if settings.dtype and parse_dtype(settings.dtype) != parse_dtype(manifest.dtype):
            raise CheckpointError(
                f"is to compute in {settings.dtype}, and the chunks are {manifest.dtype}: "
                f"run `mdi prepare --dtype {settings.dtype}`, or change its dtype"
            )
        return self._store.chunk(manifest, role)

    def _load(self, path: Path, cached: StoredChunk | None = None) -> None:
        """Starts a thread that loads a chunk. A daemon, so that a node which ends does not wait for it."""
        self._loading = True

        def run() -> None:
            outcome = self._outcome_of_loading(path)
            self._post(self._finish_loading, outcome, cached)

        threading.Thread(target=run, name="mdi-load", daemon=True).start()

    def _outcome_of_loading(self, path: Path) -> LoadedStage | Exception:
        """For the thread that loads."""
        try:
            return load_chunk(
                path,
                device=self._settings.device,
                dtype=self._settings.dtype,
                progress=self._show,
                verified=lambda manifest, entry: self._post(self._note_verified, manifest, entry),
            )
        except Exception as error:
            return error

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        """Calls a function in the event loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and the process ends
            self._loop.call_soon_threadsafe(function, *arguments)

    def _note_verified(self, manifest: Manifest, entry: ChunkEntry) -> None:
        self.manifest_digest, self._sha256 = manifest.digest, entry.sha256

    def _finish_loading(self, outcome: LoadedStage | Exception, cached: StoredChunk | None) -> None:
        self._loading = False
        if isinstance(outcome, LoadedStage):
            self.loaded = outcome
        elif isinstance(outcome, CheckpointError) and cached:
            self._discard(cached, outcome)
        elif isinstance(outcome, MDIError):
            self._fail(str(outcome))
        else:
            log.error("the chunk could not be loaded", exc_info=outcome)
            self._fail("the chunk could not be loaded; this node's log has the details")

    def _discard(self, cached: StoredChunk, error: CheckpointError) -> None:
        """Removes a damaged chunk from the cache: the starter sends it again."""
        log.warning("%s; it is removed, and is sent again", error)
        self.manifest_digest = self._sha256 = ""
        self._damaged = str(error) if self._intake.came_whole else ""
        try:
            cached.discard()
        except CheckpointError as refused:
            self._fail(str(refused))

    def _fail(self, error: str) -> None:
        self.error = error
        self._failed()

    def _show(self, what: str, done: int, total: int) -> None:
        self._progress = (done, total)
        if self._settings.progress:
            self._settings.progress(what, done, total)
