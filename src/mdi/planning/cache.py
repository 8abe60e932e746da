"""The budget of the KV cache: how many tokens the nodes have memory for, and how long a sequence may be. Arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from mdi.core.batch import CACHE_BLOCK
from mdi.core.config import CacheSettings
from mdi.core.errors import ConfigError
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig

CACHE_SHARE = 0.5
"""Part of the free memory that the cache may take where no limit is given: this and other processes need some."""

PLANNED_TOKENS = 4096
"""What a plan keeps free for at least, where neither a limit nor a sequence length is given."""


@dataclass(frozen=True)
class CacheNode:
    """A node of the pipeline, as its KV cache needs it.

    n_layers: in its stage. free_bytes: what remains beside the weights, for this node alone. whole: its device takes
    the memory of all slots at the start, and not as they fill. n_kv_heads: of a rank; None is all of the model's.
    """

    name: str
    n_layers: int
    free_bytes: float = math.inf
    whole: bool = False
    n_kv_heads: int | None = None


@dataclass(frozen=True)
class CacheBudget:
    """tokens: of all sequences together, which every node has memory for; n_slots, sequence_length: of the cache.

    remedy: how a server takes longer sequences, for messages; empty where the model takes no longer ones. note: what
    an operator should know of it, if anything.
    """

    n_slots: int
    sequence_length: int
    tokens: int
    remedy: str = ""
    note: str = ""


def token_bytes(config: ModelConfig, dtype: str, n_layers: int = 1) -> int:
    """Bytes of one token in the cache of so many layers. config: of a rank's layers, for a rank (`Parts.config`).

    dtype: of the cache; in int8 each head has a float32 scale.
    """
    if dtype == "int8":
        return n_layers * 2 * config.n_kv_heads * (config.head_dim + 4)
    return TensorSpec((n_layers, 2, config.n_kv_heads, config.head_dim), dtype).size_bytes


def cache_budget(config: ModelConfig, settings: CacheSettings, dtype: str, nodes: Sequence[CacheNode]) -> CacheBudget:
    """The budget that all nodes can hold. Sequences may be as long as the settings say, or as fits.

    Raises ConfigError where a limit is more than is free, or where no sequence of the length that is wanted fits.
    """
    longest = settings.sequence_length_for(config.max_positions)
    wanted = CacheBudget(
        settings.max_sequences,
        longest,
        settings.max_sequences * _whole_blocks(longest),
        "" if longest == config.max_positions else "raise the server's --sequence-length",
    )
    rooms = [(_tokens(config, settings, dtype, node, wanted.tokens), node) for node in nodes]
    tokens, scarcest = min(rooms, key=itemgetter(0))
    if any(node.whole for node in nodes):
        return _allocated_whole(settings, wanted, tokens, scarcest)
    if tokens >= _whole_blocks(longest):
        return replace(wanted, tokens=min(tokens, wanted.tokens))
    return _shortened(settings, wanted, tokens, tokens, scarcest)


def planned_tokens(settings: CacheSettings, max_positions: int) -> int:
    """Tokens that a plan keeps memory free for on every node; `planned_bytes` limits what they take."""
    longest = settings.sequence_length_for(max_positions)
    if settings.kv_cache_gb is not None:
        return settings.max_sequences * _whole_blocks(longest)
    return longest if settings.sequence_length else min(PLANNED_TOKENS, longest)


def planned_bytes(settings: CacheSettings) -> float:
    """Most bytes that a plan keeps free for the cache of a node."""
    return math.inf if settings.kv_cache_gb is None else settings.kv_cache_gb * 1e9


def _tokens(config: ModelConfig, settings: CacheSettings, dtype: str, node: CacheNode, wanted: int) -> int:
    """Tokens that one node has memory for, in whole blocks."""
    own = replace(config, n_kv_heads=node.n_kv_heads or config.n_kv_heads)
    each = token_bytes(own, settings.kv_cache_dtype or dtype, node.n_layers)
    if settings.kv_cache_gb is None:
        return int(min(wanted, node.free_bytes * CACHE_SHARE // each)) // CACHE_BLOCK * CACHE_BLOCK
    tokens = int(min(wanted, settings.kv_cache_gb * 1e9 // each)) // CACHE_BLOCK * CACHE_BLOCK
    if tokens * each > node.free_bytes:
        raise ConfigError(
            f"a KV cache of {tokens * each / 1e9:.1f} GB does not fit into the {node.free_bytes / 1e9:.1f} GB that are "
            f"free on {node.name}: lower --kv-cache-gb"
        )
    return tokens


def _allocated_whole(settings: CacheSettings, wanted: CacheBudget, tokens: int, scarcest: CacheNode) -> CacheBudget:
    """Slots times their length fit: fewer slots where a length is wanted, shorter ones otherwise."""
    if tokens >= wanted.tokens:
        return wanted
    if settings.sequence_length is None:
        return _shortened(settings, wanted, tokens // wanted.n_slots, tokens, scarcest)
    n_slots = tokens // _whole_blocks(wanted.sequence_length)
    if n_slots == 0:
        return _shortened(settings, wanted, tokens, tokens, scarcest)
    note = f"{scarcest.name} has memory for {n_slots} sequences of {wanted.sequence_length} tokens at once: more wait"
    return replace(wanted, n_slots=n_slots, tokens=n_slots * _whole_blocks(wanted.sequence_length), note=note)


def _shortened(
    settings: CacheSettings, wanted: CacheBudget, length: int, tokens: int, scarcest: CacheNode
) -> CacheBudget:
    length = length // CACHE_BLOCK * CACHE_BLOCK
    if settings.sequence_length is not None or not length:
        raise ConfigError(
            f"the KV cache of {scarcest.name} has memory for {tokens} tokens, and a sequence takes "
            f"{wanted.sequence_length}: raise --kv-cache-gb, add a node or memory, or lower --sequence-length"
        )
    note = (
        f"the KV cache of {scarcest.name} has memory for {tokens} tokens: sequences are {length} tokens long at most, "
        f"not {wanted.sequence_length}"
    )
    return replace(wanted, sequence_length=length, tokens=tokens, remedy="raise the server's --kv-cache-gb", note=note)


def _whole_blocks(n_tokens: int) -> int:
    return -(-n_tokens // CACHE_BLOCK) * CACHE_BLOCK
