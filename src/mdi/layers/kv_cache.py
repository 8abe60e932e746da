"""Keys and values of every slot, one tensor for each layer, written in place. Knows no sequences: slots are rows.

On CPUs the operating system gives memory page by page when it is first written: a cache takes what its sequences fill.
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
        """Copies the prefix of one slot to another."""
        for layer in self.layers:
            layer[copy.target, : copy.length] = layer[copy.source, : copy.length]
