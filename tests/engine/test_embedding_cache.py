"""Encoded images are kept up to a limit; the least recently used one is evicted first."""

from __future__ import annotations

import torch

from mdi.engine.embedding_cache import EmbeddingCache


def test_what_was_used_longest_ago_leaves_first() -> None:
    rows = torch.zeros(10, 10)
    cache = EmbeddingCache(2 * rows.nbytes)
    for digest in (b"a", b"b"):
        cache.put(digest, rows)
    assert cache.get(b"a") is rows
    cache.put(b"c", rows)
    assert [cache.get(digest) is None for digest in (b"a", b"b", b"c")] == [False, True, False]
    assert cache.size_bytes == 2 * rows.nbytes


def test_what_is_larger_than_the_limit_is_not_kept() -> None:
    cache = EmbeddingCache(10)
    cache.put(b"a", torch.zeros(100))
    assert cache.get(b"a") is None
    assert cache.size_bytes == 0
