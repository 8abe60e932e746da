"""What one rank of a group has of each tensor: rows of some, columns of others, the rest whole (arXiv:1909.08053).

Of attention it has its query heads, and every KV head that they use; of an MLP, and of each expert, its columns; of
the LM head its rows of the vocabulary. Norms, routers, the embedding and the vision tower are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from mdi.core.errors import ConfigError
from mdi.core.group import Rank
from mdi.core.quantization import FORMATS, ModelQuantization, QuantizedTensor
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, EXPERTS, LAYERS, LM_HEAD
from mdi.models.shards import Shards, kv_heads, rank_config, shard_step

WHOLE = Rank(0, 1, 1)
"""Of a stage that one node computes."""


@dataclass(frozen=True)
class Part:
    """Of one tensor. rows: of its outputs, in order, some perhaps twice; columns: of its inputs; None is all."""

    rows: tuple[range, ...] | None = None
    columns: range | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """tensor: [outputs] or [outputs, inputs]. A view of it where rows follow one another."""
        if self.columns is not None:
            tensor = tensor[:, self.columns.start : self.columns.stop].contiguous()
        if self.rows is None:
            return tensor
        parts = [tensor[rows.start : rows.stop] for rows in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def of_quantized(self, matrix: QuantizedTensor) -> QuantizedTensor:
        """The same integers and scales: columns are whole groups."""
        inputs = matrix.shape[1]
        values, scales = self._scaled(matrix.values, inputs), self._scaled(matrix.scales, inputs)
        offsets = (matrix.zeros, matrix.minimums)
        zeros, minimums = (None if part is None else self._scaled(part, inputs) for part in offsets)
        return QuantizedTensor(matrix.quantization, values, scales, zeros, matrix.order, minimums)

    def _scaled(self, tensor: Tensor, inputs: int) -> Tensor:
        """Of one with fewer numbers than inputs: those of the columns. One number for all inputs is of every part."""
        width = tensor.shape[1]
        if self.columns is None or width == 1:
            return Part(self.rows).of(tensor)
        columns = range(self.columns.start * width // inputs, self.columns.stop * width // inputs)
        return Part(self.rows, columns).of(tensor)


@dataclass(frozen=True)
class Parts:
    """What a node has of the tensors of its stage.

    config: of its layers: fewer heads, narrower MLPs. heads: of query channels; kv: of key and value channels;
    inner, experts: of an MLP's inner width, and of an expert's; vocab: of the LM head's rows. embedding: whether it
    has the embedding whole; a tied head without one is cut from it.
    """

    config: ModelConfig
    heads: range
    kv: tuple[range, ...]
    inner: range
    experts: range
    vocab: range
    embedding: bool

    @classmethod
    def of(cls, config: ModelConfig, spec: StageSpec, quantization: ModelQuantization) -> Parts:
        """config: of the model. Raises ConfigError where it cannot be cut into so many shards."""
        rank = spec.rank or WHOLE
        shards = Shards.of(config, rank.n_shards, shard_step(quantization))
        if len(rank.shards) < rank.n_shards:
            _check_order(quantization)
        first, last = rank.first_shard, rank.last_shard
        heads = range(shards.heads[first], shards.heads[last])
        inner = {size: range(bounds[first], bounds[last]) for size, bounds in shards.inner.items()}
        return cls(
            rank_config(config, rank, shards),
            _channels(heads, config.head_dim),
            tuple(_channels(run, config.head_dim) for run in _runs(kv_heads(config, heads))),
            inner.get(config.intermediate_size, range(0)),
            inner[config.experts.inner_size] if config.experts else range(0),
            range(shards.vocab[first], shards.vocab[last]),
            spec.embedding,
        )

    def part(self, name: str) -> Part:
        """Of a tensor, by its name."""
        if name == LM_HEAD or (name == EMBEDDING and not self.embedding):
            return Part((self.vocab,))
        if not name.startswith(LAYERS):
            return Part()
        inner = self.experts if EXPERTS in name else self.inner
        attention = {"q_proj": (self.heads,), "k_proj": self.kv, "v_proj": self.kv}
        rows = {**attention, "gate_proj": (inner,), "up_proj": (inner,)}
        columns = {"o_proj": self.heads, "down_proj": inner}
        module = name.split(".")[-2]
        return Part(rows.get(module), columns.get(module))

    @overload
    def cut(self, name: str, tensor: Tensor) -> Tensor: ...

    @overload
    def cut(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor: ...

    def cut(self, name: str, tensor: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        """This node's part of a whole tensor; of a matrix that was quantised as a whole, with the same integers."""
        part = self.part(name)
        return part.of_quantized(tensor) if isinstance(tensor, QuantizedTensor) else part.of(tensor)


def _check_order(quantization: ModelQuantization) -> None:
    """Refuses inputs in an order of their own: those of a rank's heads would lie all over a matrix."""
    if quantization.layers and FORMATS[quantization.layers].ordered:
        raise ConfigError(
            "the checkpoint's weights are quantised in an order of inputs of their own (GPTQ with desc_act), which "
            "cannot be cut for the nodes of a group: split the model by layers (no --tensor-parallel-size, no "
            "--groups), or quantise it without desc_act"
        )


def _channels(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _runs(heads: Sequence[int]) -> list[range]:
    """Heads that follow one another, as ranges."""
    starts = [0, *(index for index, (one, other) in enumerate(pairwise(heads), 1) if other != one + 1), len(heads)]
    return [range(heads[start], heads[end - 1] + 1) for start, end in pairwise(starts)]
