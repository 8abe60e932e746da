"""The decoder of all families, or any run of its layers. Holds weights only; caches and positions are arguments.

Mathematics as in transformers' `modeling_qwen2_vl.py`: RMSNorm, attention with grouped heads and rotary positions,
RMSNorm, an MLP with a gate or a mixture of experts, each with a residual. What differs between families are fields of
`ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.batch import Deepstack
from mdi.core.group import Group, InputShards, LayerShards
from mdi.core.tensors import GetTensor, Unquantized, within
from mdi.kernels.decoder import LayerWeights, NativeLayers
from mdi.kernels.experts import PackedExperts
from mdi.kernels.packed import PackedWeight
from mdi.layers.attention import Layout, attend, rotate
from mdi.layers.kv_cache import KVCache
from mdi.layers.linear import Linear, PackedLinear, add_partials
from mdi.layers.mlp import MLP, Experts, Product
from mdi.layers.norm import RMSNorm
from mdi.layers.rope import Rotation
from mdi.models.config import ExpertsConfig, ModelConfig, StageSpec
from mdi.models.shards import vocabulary_rows

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
LAYERS = "model.layers."
EXPERTS = ".mlp.experts."
"""In the names of the experts' tensors, not of their router's."""


class Decoder:
    """A stage's layers, with the token embedding before them and the LM head after them where the spec says so."""

    def __init__(
        self,
        config: ModelConfig,
        spec: StageSpec,
        embedding: Tensor | None,
        get: GetTensor,
        *,
        tied_head: bool,
    ) -> None:
        """config: of the layers that the stage has: a rank's own (`rank_config`), whose tensors `get` gives.

        embedding: [vocab_size, hidden_size] as stored, where the stage has it. tied_head: the head's weight is the
        same; a rank's head has some rows of it.
        """
        self.embedding = embedding
        self.embedding_scale = float(torch.tensor(config.embedding_scale).to(get.dtype))  # rounded as in transformers
        self.layers = [DecoderLayer(config, layer, within(f"{LAYERS}{layer}.", get)) for layer in spec.layers]
        self._native = _native(config, self.layers)
        self.norm = self.lm_head = None
        if spec.head:
            self.norm = norm_of(config, get, stem(FINAL_NORM))
            rows = vocabulary_rows(config, spec.rank)
            shared = embedding[rows.start : rows.stop] if tied_head and embedding is not None else None
            get_head = get if shared is None else Unquantized(lambda *_: shared, get.dtype)
            head = stem(EMBEDDING if tied_head else LM_HEAD)
            self.lm_head = Linear.load(get_head, {head: len(rows)}, config.hidden_size)

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [tokens] -> [tokens, hidden_size]."""
        assert self.embedding is not None
        rows = functional.embedding(token_ids.to(self.embedding.device), self.embedding)
        return rows if self.embedding_scale == 1 else rows * self.embedding_scale

    def forward(
        self,
        hidden: Tensor,
        rotations: Sequence[Rotation],
        cache: KVCache,
        layout: Layout,
        group: Group | None = None,
        *,
        shards: LayerShards | None = None,
        deepstack: Deepstack | None = None,
    ) -> Tensor:
        """Runs the stage's layers over a packed batch: [tokens, hidden_size] -> the same. Writes the cache.

        Where kernels compute, one native call does it, with the same bits. rotations: one for each of
        `ModelConfig.ropes`. group: the other ranks that compute the stage, in the same step. shards: those that this
        rank has, or the parts in which one node adds up; needed in a group. deepstack: of the stage's first layer and
        those after it; a native call then ends behind each layer that adds some.
        """
        arguments = rotations, cache, layout, group, shards
        if deepstack is None:
            return self._run(slice(None), hidden, *arguments)
        n_deep = min(len(deepstack.features), len(self.layers))
        for index, features in enumerate(deepstack.features[:n_deep]):
            hidden = self._run(slice(index, index + 1), hidden, *arguments)
            hidden.index_add_(0, deepstack.rows, features)
        return hidden if n_deep == len(self.layers) else self._run(slice(n_deep, None), hidden, *arguments)

    def _run(
        self,
        part: slice,
        hidden: Tensor,
        rotations: Sequence[Rotation],
        cache: KVCache,
        layout: Layout,
        group: Group | None,
        shards: LayerShards | None,
    ) -> Tensor:
        """Some of the stage's layers, one after the other. Returns a tensor of its own."""
        if self._native:
            tables, caches = [(rotation.cos, rotation.sin) for rotation in rotations], (cache.layers, cache.scales)
            return self._native.forward(hidden, tables, layout.runs, *caches, shards=shards, group=group, part=part)
        scales: Sequence[Tensor | None] = cache.scales or [None] * len(cache.layers)
        layers = zip(self.layers[part], cache.layers[part], scales[part], strict=True)
        for layer, layer_cache, layer_scales in layers:
            hidden = layer.forward(hidden, rotations, layer_cache, layout, group, layer_scales, shards)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: [rows, hidden_size] -> [rows, own part of the vocabulary], in the stage's dtype."""
        assert self.norm is not None
        assert self.lm_head is not None
        return self.lm_head(self.norm(hidden))


class DecoderLayer:
    """One layer. q, k and v are one product: their weights are read in one pass."""

    def __init__(self, config: ModelConfig, layer: int, get: GetTensor) -> None:
        hidden = config.hidden_size
        sizes = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
        qkv = {f"self_attn.{name}_proj": size for name, size in sizes.items()}
        self.config = config
        self.kind = config.kinds[layer]
        self.rotation = config.rotation_of(layer)
        self.input_norm = norm_of(config, get, "input_layernorm")
        self.qkv = Linear.load(get, qkv, hidden, bias=config.qkv_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = norm_of(config, get, "self_attn.q_norm", config.head_dim, config.query_scale)
            self.k_norm = norm_of(config, get, "self_attn.k_norm", config.head_dim)
        self.out = Linear.load(get, {"self_attn.o_proj": hidden}, config.q_size)
        self.attention_post_norm = self.mlp_post_norm = None
        if config.post_norms:
            self.attention_post_norm = norm_of(config, get, "post_attention_layernorm")
            self.mlp_post_norm = norm_of(config, get, "post_feedforward_layernorm")
        mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        self.mlp_norm = norm_of(config, get, mlp_norm)
        self.mlp = _mlp(get, config, config.experts_of(layer))

    def forward(
        self,
        hidden: Tensor,
        rotations: Sequence[Rotation],
        cache: Tensor,
        layout: Layout,
        group: Group | None = None,
        scales: Tensor | None = None,
        shards: LayerShards | None = None,
    ) -> Tensor:
        """hidden: [tokens, hidden_size]; cache, scales: this layer's slots. group, shards: as of `Decoder.forward`."""
        rotation = None if self.rotation is None else rotations[self.rotation]
        attention = self._attention(self.input_norm(hidden), rotation, cache, layout, scales)
        out = inner = None
        if shards:
            out, inner = shards.out, shards.expert_down if isinstance(self.mlp, Experts) else shards.down
        hidden = _add_product(hidden, self.out, attention, group, out, self.attention_post_norm)
        return _add_product(hidden, self.mlp, self.mlp_norm(hidden), group, inner, self.mlp_post_norm)

    def _attention(
        self, x: Tensor, rotation: Rotation | None, cache: Tensor, layout: Layout, scales: Tensor | None
    ) -> Tensor:
        qkv = self.qkv(x).view(len(x), -1, self.config.head_dim)  # [tokens, q + k + v heads, head_dim]
        norms = (self.q_norm, self.k_norm) if self.q_norm and self.k_norm else None
        queries = rotate(qkv, rotation, cache, layout, norms, scales)
        return attend(queries, cache, layout, scales, window=self.kind.window)

    @property
    def native(self) -> LayerWeights | None:
        """What the kernel of whole layers computes with; None where not all weights are packed for kernels."""
        qkv, out, mlp = self.qkv, self.out, _packed(self.mlp)
        if not (isinstance(qkv, PackedLinear) and isinstance(out, PackedLinear) and mlp):
            return None
        return LayerWeights(
            qkv.packed,
            out.packed,
            mlp,
            qkv_bias=qkv.bias,
            input_norm=self.input_norm.exact,
            mlp_norm=self.mlp_norm.exact,
            q_norm=self.q_norm.exact if self.q_norm else None,
            k_norm=self.k_norm.exact if self.k_norm else None,
            attention_post_norm=self.attention_post_norm.exact if self.attention_post_norm else None,
            mlp_post_norm=self.mlp_post_norm.exact if self.mlp_post_norm else None,
            window=self.kind.window,
            rotation=self.rotation,
        )


def norm_of(config: ModelConfig, get: GetTensor, name: str, size: int | None = None, scale: float = 1.0) -> RMSNorm:
    """One of a decoder's norms, by default of hidden states. scale: what it multiplies by beside its weight."""
    settings = {"offset": config.norm_offset, "scale": scale}
    return RMSNorm(get, name, size or config.hidden_size, config.rms_eps, config.norm_dtype, **settings)


def _mlp(get: GetTensor, config: ModelConfig, experts: ExpertsConfig | None) -> MLP | Experts:
    if experts is None:
        return MLP(get, "mlp", config.hidden_size, config.intermediate_size, config.activation)
    return Experts(
        get,
        "mlp",
        config.hidden_size,
        experts.inner_size,
        count=experts.count,
        per_token=experts.per_token,
        normalised=experts.normalised,
        activation=config.activation,
    )


def _packed(mlp: MLP | Experts) -> tuple[PackedWeight, PackedWeight] | PackedExperts | None:
    """None where not all weights are packed for kernels."""
    if isinstance(mlp, Experts):
        return mlp.packed
    if isinstance(mlp.gate_up, PackedLinear) and isinstance(mlp.down, PackedLinear):
        return mlp.gate_up.packed, mlp.down.packed
    return None


def _native(config: ModelConfig, layers: Sequence[DecoderLayer]) -> NativeLayers | None:
    weights = [native for layer in layers if (native := layer.native)]
    if not weights or len(weights) < len(layers):
        return None
    return NativeLayers(weights, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, eps=config.rms_eps)


def _add_product(
    residual: Tensor,
    product: Product,
    x: Tensor,
    group: Group | None,
    shards: InputShards | None,
    norm: RMSNorm | None = None,
) -> Tensor:
    """residual + product(x), or + norm(product(x)), where all shards' sums are added up and rounded before."""
    if norm is None and group is None:
        return product.add_to(residual, x, shards)
    if shards is None:
        assert norm
        return norm.add_to(residual, product(x))
    partials = _partials(residual, product, x, group, shards)
    return norm.add_to(residual, add_partials(partials)) if norm else add_partials(partials, residual)


def _partials(residual: Tensor, product: Product, x: Tensor, group: Group | None, shards: InputShards) -> Tensor:
    """All shards' sums: [shards, *residual]. In a group each rank has some, and gets those of the others."""
    own = x.new_empty(shards.count, *residual.shape)
    product.partials(x, shards, own)
    if group is None:
        return own
    first = group.rank.first_shard
    partials = torch.empty(group.rank.n_shards, *residual.shape, dtype=residual.dtype)
    partials[first : first + shards.count] = own
    group.exchange(partials)
    return partials.to(residual.device)


def stem(weight: str) -> str:
    """A weight's name as layers are called with: without `.weight`."""
    return weight.removesuffix(".weight")
