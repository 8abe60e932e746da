"""Images and videos that wait to be encoded, in order of arrival: on this node or on the vision node.

Belongs to the step loop's thread. Results go to their requests and into the embedding cache.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from mdi.cluster.remote_encoder import Encoded, RemoteEncoder
from mdi.core.histogram import Histogram
from mdi.engine.embedding_cache import EmbeddingCache
from mdi.engine.sequence import Request
from mdi.models.stage import Stage

ENCODE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)


@dataclass(frozen=True)
class EncodeDone:
    """The outcome of the vision node's work on the next image or video of a request."""

    request: Request
    digest: bytes
    outcome: Encoded


class VisionQueue:
    """Encodes one image or video at a time.

    remote: where to encode; None encodes on this node, in parts between batches. post: called with each outcome of
    `remote`, from another thread; the loop then calls `take` with it. hits, misses: images and videos that the cache
    had, and that are or were encoded. encode_s: seconds of each encoding.
    """

    def __init__(
        self, stage: Stage, cache: EmbeddingCache, remote: RemoteEncoder | None, post: Callable[[EncodeDone], None]
    ) -> None:
        self.hits = self.misses = 0
        self.encode_s = Histogram(ENCODE_S)
        self._began_s = 0.0  # the encoding, by time.monotonic
        self._stage = stage
        self._cache = cache
        self._remote = remote
        self._post = post
        self._waiting: deque[Request] = deque()
        self._parts: Generator[None, None, Tensor] | None = None  # of the image that is encoded on this node
        self._remote_work: Future[Encoded] | None = None  # what the vision node is encoding

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue, unless all its media are in the cache."""
        while not request.encoded and self._take_known(request):
            pass
        if not request.encoded:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Stops encoding for this request."""
        if self._waiting and self._waiting[0] is request:
            self._parts = None
            if self._remote_work:
                self._remote_work.cancel()

    def encode(self, seconds: float) -> bool:
        """Encodes for so long, but at least one part of an image; False when there is nothing to encode here."""
        until_s = time.perf_counter() + seconds
        if self._parts is None:
            self._parts = self._next_parts()
        if self._parts is None:
            return False
        try:
            with self._stage.working("encode"):
                next(self._parts)
                while time.perf_counter() < until_s:
                    next(self._parts)
        except StopIteration as done:
            self._parts = None
            self.encode_s.add(time.monotonic() - self._began_s)
            request = self._waiting[0]
            self._keep(request, request.next_media.patches.digest, done.value)
        return True

    def take(self, done: EncodeDone) -> None:
        """Keeps what the vision node has encoded, and lets it encode the next."""
        self._remote_work = None
        if isinstance(done.outcome, Tensor):
            self.encode_s.add(time.monotonic() - self._began_s)
            self._keep(done.request, done.digest, done.outcome)

    def _keep(self, request: Request, digest: bytes, embeddings: Tensor) -> None:
        self._cache.put(digest, embeddings)
        if not request.cancelled:
            request.add_embeddings(embeddings)
        if request.encoded:  # now: it may have ended at the next step, and its embeddings with it
            self._waiting.popleft()

    def _next_parts(self) -> Generator[None, None, Tensor] | None:
        """The encoding of the next image that the cache does not have; None when there is none, or it is remote."""
        while self._waiting and not self._remote_work:
            request = self._waiting[0]
            if request.encoded or request.cancelled:
                self._waiting.popleft()
                continue
            if self._take_known(request):
                continue
            patches = request.next_media.patches
            self.misses += 1
            self._began_s = time.monotonic()
            if self._remote is None:
                return self._stage.encode_steps(torch.from_numpy(patches.rows), patches.grid)
            self._encode_remotely(self._remote, request)
        return None

    def _take_known(self, request: Request) -> bool:
        """Gives a request the embeddings of its next image or video, if the cache has them."""
        known = self._cache.get(request.next_media.patches.digest)
        if known is not None:
            self.hits += 1
            request.add_embeddings(known)
        return known is not None

    def _encode_remotely(self, remote: RemoteEncoder, request: Request) -> None:
        patches = request.next_media.patches
        self._remote_work = remote.encode(
            torch.from_numpy(patches.rows),
            patches.grid,
            request.arrived_s,
            lambda outcome: self._post(EncodeDone(request, patches.digest, outcome)),
        )
