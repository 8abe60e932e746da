"""A stage's decoder layers in one native call: the binding of `c/decoder.h`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdi.core.group import Group, LayerShards
from mdi.kernels.attention import CACHE_DTYPES
from mdi.kernels.experts import PackedExperts
from mdi.kernels.library import library
from mdi.kernels.packed import FLOATS, PackedWeight, packed_shards


@dataclass(frozen=True)
class LayerWeights:
    """What one layer computes with. Biases and norms are float32; None where it has none.

    window: as `mdi.models.config.LayerKind` has it. rotation: index of what rotates queries and keys, of those that
    `NativeLayers.forward` is given; None where nothing does.
    """

    qkv: PackedWeight
    out: PackedWeight
    mlp: tuple[PackedWeight, PackedWeight] | PackedExperts  # gate and up; down
    qkv_bias: Tensor | None
    input_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    window: int = 0
    rotation: int | None = 0


WEIGHTS = ("qkv", "out", "gate_up", "down", "experts")
SHARDS = ("out", "down", "expert_down")
VECTORS = ("qkv_bias", "input_norm", "mlp_norm", "q_norm", "k_norm", "attention_post_norm", "mlp_post_norm")


class Layer(ctypes.Structure):
    """`Layer` of `c/decoder.h`."""

    _fields_ = (
        *((name, c_void_p) for name in (*WEIGHTS, *VECTORS, "cos", "sin", "cache", "scales")),
        ("window", c_int64),
    )


EXCHANGE = CFUNCTYPE(c_int, c_int64, c_int64, c_int64, c_int64)
SEND, RECEIVE = 0, 1
NO_MEMORY = 1


class Step(ctypes.Structure):
    """`Step` of `c/decoder.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("layers", "hidden", "runs")),
        *((name, c_int64) for name in ("n_layers", "n_runs", "rows", "slot_rows", "hidden_size")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim")),
        ("eps", c_float),
        *((name, c_int32) for name in ("dtype", "cache_dtype")),
        *((name, c_void_p) for name in ("out", "down", "expert_down", "partials")),
        *((name, c_int64) for name in ("first_shard", "n_shards")),
        ("exchange", EXCHANGE),
    )


class NativeLayers:
    """The layers of a stage, as the kernel is given them."""

    def __init__(self, layers: Sequence[LayerWeights], *, n_heads: int, n_kv_heads: int, eps: float) -> None:
        self._kept = list(layers)  # whose memory the addresses are of
        self._layers = (Layer * len(layers))(*map(_addresses, layers))
        self._n_heads, self._n_kv_heads, self._eps = n_heads, n_kv_heads, eps

    def forward(
        self,
        hidden: Tensor,
        rotations: Sequence[tuple[Tensor, Tensor]],
        runs: Tensor,
        caches: Sequence[Tensor],
        scales: Sequence[Tensor] = (),
        *,
        shards: LayerShards | None = None,
        group: Group | None = None,
        part: slice = slice(None),
    ) -> Tensor:
        """Runs a part of the layers over a batch: [rows, hidden_size] -> the same. Writes keys and values into caches.

        rotations: cosines and sines, float32 [rows, head_dim / 2]. runs, and each layer's cache and scales: as
        `attention.attend` has them. shards: of what is added to hidden states. group: the other ranks, with which it is
        summed up; raises what the exchange raises.
        """
        tables = [(cos.data_ptr(), sin.data_ptr()) for cos, sin in rotations]
        for index, (layer, weights, cache) in enumerate(zip(self._layers, self._kept, caches, strict=True)):
            layer.cache = cache.data_ptr()
            layer.scales = scales[index].data_ptr() if scales else None
            if weights.rotation is not None:
                layer.cos, layer.sin = tables[weights.rotation]
        first, last, _ = part.indices(len(self._kept))
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        cut = {name: packed_shards(held) for name in SHARDS if (held := getattr(shards, name, None))}
        sums = _PartialSums(group, hidden) if group else None
        step = Step(
            layers=ctypes.addressof(self._layers) + first * ctypes.sizeof(Layer),
            hidden=hidden.data_ptr(),
            runs=runs.data_ptr(),
            n_layers=last - first,
            n_runs=len(runs),
            rows=len(hidden),
            slot_rows=caches[0].shape[1],
            hidden_size=hidden.shape[1],
            heads=self._n_heads,
            kv_heads=self._n_kv_heads,
            head_dim=caches[0].shape[4],
            eps=self._eps,
            dtype=FLOATS[hidden.dtype],
            cache_dtype=CACHE_DTYPES[caches[0].dtype],
            **{name: ctypes.addressof(held) for name, held in cut.items()},
        )
        if sums:
            sums.add_to(step)
        failed = _kernel()(ctypes.byref(step))
        if failed == NO_MEMORY:
            raise MemoryError(f"no memory for a step of {len(hidden)} rows")
        if failed:
            assert sums
            assert sums.error
            raise sums.error
        return hidden


class _PartialSums:
    """What the ranks of a group exchange while a kernel runs: its calling thread does it, from inside.

    error: what an exchange raised.
    """

    def __init__(self, group: Group, hidden: Tensor) -> None:
        self.error: BaseException | None = None
        self._group = group
        self._partials = hidden.new_empty(2, group.rank.n_shards, *hidden.shape)
        self._parts = list(self._partials)
        self._exchange = EXCHANGE(self.exchange)

    def add_to(self, step: Step) -> None:
        step.partials = self._partials.data_ptr()
        step.first_shard, step.n_shards = self._group.rank.first_shard, self._group.rank.n_shards
        step.exchange = self._exchange

    def exchange(self, what: int, which: int, first_row: int, last_row: int) -> int:
        """Returns 0, or 1 where it failed."""
        try:
            if what == SEND:
                self._group.send(self._parts[which], slice(first_row, last_row))
            elif what == RECEIVE:
                self._group.receive(self._parts[which], last_row)
            else:
                self._group.exchange(self._parts[0])
        except BaseException as error:
            self.error = error
            return 1
        return 0


def _addresses(layer: LayerWeights) -> Layer:
    if isinstance(layer.mlp, PackedExperts):
        mlp = {"experts": layer.mlp.address}
    else:
        gate_up, down = layer.mlp
        mlp = {"gate_up": gate_up.address, "down": down.address}
    vectors = {name: getattr(layer, name) for name in VECTORS}
    addresses = {name: None if held is None else held.data_ptr() for name, held in vectors.items()}
    products = {"qkv": layer.qkv.address, "out": layer.out.address, **mlp}
    return Layer(**products, **addresses, window=layer.window)


@functools.cache
def _kernel() -> Callable[..., Any]:
    found = library()
    assert found is not None
    return found.kernel("decoder", ctypes.POINTER(Step), result=c_int)
