"""Which tensors of which shapes each part of the model needs, under the hub's names. Holds no weights."""

from __future__ import annotations

from dataclasses import dataclass

from mdi.core.dtypes import parse_dtype
from mdi.core.tensors import Specs, TensorSpec
from mdi.models.config import ModelConfig, VisionConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class StageSpec:
    """The part of the model a stage holds: decoder layers [first_layer, last_layer), half-open, and the ends.

    `head` is the final norm and the LM head. `vision` needs not sit with `embedding`, but does unless told otherwise.
    """

    first_layer: int
    last_layer: int
    embedding: bool = False
    vision: bool = False
    head: bool = False

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer)


def stage_specs(config: ModelConfig, spec: StageSpec, dtype: str) -> Specs:
    """Every tensor of a stage that is computed in `dtype`: exactly these, nothing missing, nothing left over.

    Raises CheckpointError for a dtype that the model is not computed in.
    With tied embeddings a head's matrix is stored under the embedding's name, in the first and in the last chunk.
    """
    parse_dtype(dtype)
    shapes: Shapes = {}
    vocabulary = (config.vocab_size, config.hidden_size)
    if spec.embedding:
        shapes[EMBEDDING] = vocabulary
    if spec.vision and config.vision:
        shapes |= vision_shapes(config.vision)
    for layer in spec.layers:
        shapes |= layer_shapes(config, layer)
    if spec.head:
        shapes[FINAL_NORM] = (config.hidden_size,)
        shapes[head_name(config)] = vocabulary
    return {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}


def head_name(config: ModelConfig) -> str:
    """Where the LM head's matrix is stored."""
    return EMBEDDING if config.tied_embeddings else LM_HEAD


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def layer_shapes(config: ModelConfig, layer: int) -> Shapes:
    """One decoder layer."""
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    return {layer_prefix(layer) + name: shape for name, shape in shapes.items()}


def vision_shapes(vision: VisionConfig) -> Shapes:
    """The whole vision tower: patch embedding, blocks, merger."""
    kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: Shapes = {"visual.patch_embed.proj.weight": (vision.width, vision.in_channels, *kernel)}
    for block in range(vision.depth):
        shapes |= _block_shapes(vision, f"visual.blocks.{block}.")
    merged = vision.merged_width
    return shapes | {
        "visual.merger.ln_q.weight": (vision.width,),
        "visual.merger.ln_q.bias": (vision.width,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (vision.out_size, merged),
        "visual.merger.mlp.2.bias": (vision.out_size,),
    }


def _block_shapes(vision: VisionConfig, prefix: str) -> Shapes:
    width, inner = vision.width, vision.mlp_size
    shapes: Shapes = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
    return {prefix + name: shape for name, shape in shapes.items()}
