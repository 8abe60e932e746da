"""The decoder of Qwen2 and Qwen2-VL, or any run of its layers. Holds weights only; caches and positions are handed in.

Mathematics as in transformers' `modeling_qwen2_vl.py`: RMSNorm, attention with grouped heads and rotary positions,
RMSNorm, SwiGLU, each with a residual.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mdi.layers.attention import Layout, attend
from mdi.layers.kv_cache import KVCache
from mdi.layers.linear import Linear
from mdi.layers.rope import Rotation
from mdi.models.config import ModelConfig
from mdi.models.weights import EMBEDDING, FINAL_NORM, StageSpec, head_name, layer_prefix

Get = Callable[[str], Tensor]
"""A tensor by its hub name, in the stage's dtype on its device. Each name is asked for once."""


class Decoder:
    """A stage's layers, with the token embedding in front and the LM head behind where the spec says so."""

    def __init__(self, config: ModelConfig, spec: StageSpec, get: Get) -> None:
        self.config = config
        self.spec = spec
        tied_here = spec.embedding and spec.head and config.tied_embeddings
        self.embedding = get(EMBEDDING) if spec.embedding else None
        self.layers = [DecoderLayer(config, layer_prefix(layer), get) for layer in spec.layers]
        self.norm = get(FINAL_NORM) if spec.head else None
        head = self.embedding if tied_here else get(head_name(config)) if spec.head else None
        self.lm_head = Linear([head]) if head is not None else None

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [tokens] -> [tokens, hidden_size]."""
        assert self.embedding is not None
        return functional.embedding(token_ids.to(self.embedding.device), self.embedding)

    def forward(self, hidden: Tensor, rotation: Rotation, cache: KVCache, layout: Layout) -> Tensor:
        """Runs the stage's layers over a packed batch: [tokens, hidden_size] -> the same. Writes the cache."""
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            hidden = layer.forward(hidden, rotation, layer_cache, layout)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: [rows, hidden_size] -> [rows, vocab_size], in the stage's dtype."""
        assert self.norm is not None
        assert self.lm_head is not None
        return self.lm_head(_rms_norm(hidden, self.norm, self.config.rms_eps))


class DecoderLayer:
    """One layer. q, k and v are one product, gate and up another: each weight is read in one pass."""

    def __init__(self, config: ModelConfig, prefix: str, get: Get) -> None:
        self.config = config
        self.input_norm = get(prefix + "input_layernorm.weight")
        projections = [prefix + f"self_attn.{name}_proj" for name in "qkv"]
        self.qkv = Linear(
            [get(name + ".weight") for name in projections], [get(name + ".bias") for name in projections]
        )
        self.out = Linear([get(prefix + "self_attn.o_proj.weight")])
        self.mlp_norm = get(prefix + "post_attention_layernorm.weight")
        self.gate_up = Linear([get(prefix + "mlp.gate_proj.weight"), get(prefix + "mlp.up_proj.weight")])
        self.down = Linear([get(prefix + "mlp.down_proj.weight")])

    def forward(self, hidden: Tensor, rotation: Rotation, cache: Tensor, layout: Layout) -> Tensor:
        """hidden: [tokens, hidden_size]; cache: this layer's slots."""
        attention = self._attention(_rms_norm(hidden, self.input_norm, self.config.rms_eps), rotation, cache, layout)
        hidden = self.out.add_to(hidden, attention)
        gate, up = self.gate_up(_rms_norm(hidden, self.mlp_norm, self.config.rms_eps)).chunk(2, dim=-1)
        return self.down.add_to(hidden, functional.silu(gate).mul_(up))

    def _attention(self, x: Tensor, rotation: Rotation, cache: Tensor, layout: Layout) -> Tensor:
        config = self.config
        qkv = self.qkv(x).view(len(x), -1, config.head_dim)  # [tokens, q + k + v heads, head_dim]
        n_rotated = config.n_heads + config.n_kv_heads
        rotated = qkv[:, :n_rotated]
        rotation(rotated, out=rotated)
        keys_values = qkv[:, config.n_heads :].view(len(x), 2, config.n_kv_heads, config.head_dim)
        cache[layout.slots, layout.cache_rows] = keys_values
        return attend(qkv[:, : config.n_heads], cache, layout)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (arXiv:1910.07467)."""
    return torch.rms_norm(x, (x.shape[-1],), weight, eps)
