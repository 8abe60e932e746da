"""Keys and values of every slot, one tensor for each layer, written in place. Knows no sequences: slots are rows.

On CPUs the operating system gives memory page by page when it is first written: a cache takes what its sequences fill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdi.core.batch import Copy

WINDOW = 128
"""Rows of a slot that are read together. Where one is read before it is written, it holds zeros or an older token."""


def window_end(length: int) -> int:
    """The end of the window that the row before `length` is in."""
    return -(-length // WINDOW) * WINDOW


class KVCache:
    """`layers[i]`: [n_slots, rows, 2 (key, value), n_kv_heads, head_dim] of a stage's i-th layer.

    rows: sequence_length, filled up to whole windows.
    """

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
        shape = (n_slots, window_end(sequence_length), 2, n_kv_heads, head_dim)
        self.layers: list[Tensor] = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.n_slots = n_slots
        self.sequence_length = sequence_length

    def copy(self, copy: Copy) -> None:
        """Copies the prefix of one slot to another, and writes zeros behind it, up to the end of a window."""
        for layer in self.layers:
            layer[copy.target, : copy.length] = layer[copy.source, : copy.length]
            layer[copy.target, copy.length : window_end(copy.length)] = 0
