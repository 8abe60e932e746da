"""Keys and values of every slot, one tensor a layer, written in place. Knows no sequences: slots are rows.

On CPUs the operating system commits memory page by page as it is first written, so a cache sized for long sequences
costs only what they really fill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdi.core.batch import Copy


class KVCache:
    """`layers[i]`: [n_slots, sequence_length, 2 (key, value), n_kv_heads, head_dim] of a stage's i-th layer."""

    def __init__(
        self,
        *,
        n_layers: int,
        n_slots: int,
        sequence_length: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (n_slots, sequence_length, 2, n_kv_heads, head_dim)
        self.layers: list[Tensor] = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.n_slots = n_slots
        self.sequence_length = sequence_length

    def copy(self, copy: Copy) -> None:
        """The beginning of one slot into another."""
        for layer in self.layers:
            layer[copy.target, : copy.length] = layer[copy.source, : copy.length]
