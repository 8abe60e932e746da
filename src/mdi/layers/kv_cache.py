"""Keys and values of every slot, one tensor for each layer, written in place. Knows no sequences: slots are rows.

On CPUs a slot takes memory as its rows are written, and gives it back: the cache is mapped memory, which the operating
system fills page by page. On other devices it is allocated whole.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from mdi.core.batch import CacheEdit, Copy
from mdi.core.errors import ConfigError


class KVCache:
    """`layers[i]`: [n_slots, sequence_length, 2 (key, value), n_kv_heads, head_dim] of a stage's i-th layer.

    In int8, a head of a token is `layers[i] * scales[i]`, and `scales[i]` float32 [n_slots, sequence_length, 2,
    n_kv_heads]; in other dtypes there are no scales. Raises ConfigError when there is no memory for it.
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
        shape = (n_slots, sequence_length, 2, n_kv_heads, head_dim)
        rows = [SlotRows(shape, dtype, device) for _ in range(n_layers)]
        scales = [SlotRows(shape[:-1], torch.float32, device) for _ in rows if dtype == torch.int8]
        self._rows = rows + scales
        self.layers: list[Tensor] = [layer.tensor for layer in rows]
        self.scales: list[Tensor] = [layer.tensor for layer in scales]
        self.n_slots = n_slots
        self.sequence_length = sequence_length

    def apply(self, edit: CacheEdit) -> None:
        """Copies the prefix of one slot to another, or gives back the memory of a slot's last rows."""
        if not isinstance(edit, Copy):
            for rows in self._rows:
                rows.release(edit.slot, edit.kept)
            return
        for layer in self.layers + self.scales:
            layer[edit.target, : edit.length] = layer[edit.source, : edit.length]


class SlotRows:
    """A tensor of [n_slots, rows, ...] whose last rows of a slot can be released: then they hold zeros, or old values.

    Only written rows take memory, on CPUs. Raises ConfigError when there is no memory for it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        n_slots, self._n_rows = shape[:2]
        self._row_bytes = math.prod(shape[2:]) * dtype.itemsize
        self._memory: mmap.mmap | None = None
        size_bytes = n_slots * self._n_rows * self._row_bytes
        if device.type != "cpu" or not size_bytes:
            self.tensor = torch.empty(shape, dtype=dtype, device=device)
            return
        try:
            self._memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConfigError(
                f"the system refuses {size_bytes / 1e9:.1f} GB for one layer's KV cache ({error.strerror}): "
                "serve fewer or shorter sequences (--max-sequences, --sequence-length)"
            ) from None
        with suppress(AttributeError, OSError):  # a huge page would be resident for the first of its rows
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.tensor = torch.frombuffer(self._memory, dtype=dtype).view(shape)

    def release(self, slot: int, kept: int) -> None:
        """Gives back the whole pages behind the first `kept` rows of a slot. Does nothing on devices without pages."""
        if self._memory is None:
            return
        start = (slot * self._n_rows + kept) * self._row_bytes
        end = (slot + 1) * self._n_rows * self._row_bytes
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)
