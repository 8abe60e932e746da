"""Encoded images and videos, kept for later requests with the same ones. Bounded in bytes; for one thread."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class EmbeddingCache:
    """Embeddings by the digest of what was encoded; the least recently used one is evicted first.

    limit_bytes: of all embeddings together; 0 keeps none.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.size_bytes = 0

    def get(self, digest: bytes) -> Tensor | None:
        """[tokens, embedding_width], not to be written to; None when they are not kept."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    def put(self, digest: bytes, embeddings: Tensor) -> None:
        if digest in self._kept or embeddings.nbytes > self._limit_bytes:
            return
        self._kept[digest] = embeddings
        self.size_bytes += embeddings.nbytes
        while self.size_bytes > self._limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.nbytes
