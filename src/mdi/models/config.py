"""What is computed: the mathematics of a model, and which part of it a stage has. Opens no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mdi.core.dtypes import DTYPE_NAMES
from mdi.core.entries import check_ids
from mdi.core.errors import CheckpointError
from mdi.core.group import Rank
from mdi.layers.rope import RopeConfig, RopeScaling
from mdi.models.entries import (
    CONFIG,
    FULL,
    SLIDING,
    DecoderEntries,
    MediaEntries,
    RopeEntries,
    TopEntries,
    decoder_ropes,
)

ATTENTION_KINDS = (FULL, SLIDING)
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
"""Of MLPs: in config.json, and as `Linear` has them."""


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. out_size: the decoder's hidden size.

    window_tokens: side of the windows that attention stays within, but in whole_frame_blocks; 0 where there are none.
    positions_per_second: of a video along time; None where each grid of its frames is one position further.
    position_side: of the square of learned positions; 0 where there are none. deepstack_blocks: whose outputs the first
    decoder layers add, in order. timestamps: each grid of a video is an image, with its time as text before it.
    """

    depth: int
    width: int
    n_heads: int
    mlp_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    in_channels: int
    out_size: int
    rope_theta: float = 10000.0
    window_tokens: int = 0
    whole_frame_blocks: tuple[int, ...] = ()
    positions_per_second: float | None = None
    position_side: int = 0
    deepstack_blocks: tuple[int, ...] = ()
    timestamps: bool = False

    @property
    def embedding_width(self) -> int:
        """Numbers that the tower makes of a token: its embedding, and what each of the first decoder layers adds."""
        return self.out_size * (1 + len(self.deepstack_blocks))

    @property
    def head_dim(self) -> int:
        return self.width // self.n_heads

    @property
    def patch_elements(self) -> int:
        """Numbers in one patch row: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_width(self) -> int:
        """Width of the merger: merge_size x merge_size neighbouring patches side by side."""
        return self.width * self.merge_size**2


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP of some layers.

    count: experts of a layer. per_token: of these, how many compute a token. inner_size: inner width of one.
    normalised: the shares of a token's experts add up to 1. layers: those that have experts.
    """

    count: int
    per_token: int
    inner_size: int
    normalised: bool
    layers: tuple[int, ...]

    def distinct(self, tokens: int) -> float:
        """Experts of a layer that some of so many tokens choose, where each chooses at random."""
        return self.count * (1 - (1 - self.per_token / self.count) ** tokens)


@dataclass(frozen=True)
class DecoderDefaults:
    """What a family takes where config.json is silent, as its config class in transformers does.

    n_kv_heads: None is as many as there are heads. head_dim: None is the hidden size by the heads. mrope_sections: None
    where positions have one axis; mrope_interleaved: see `RopeConfig`. slides: a window is one of all layers, in
    families that have no flag for it.
    """

    rope_theta: float = 10000.0
    rms_eps: float = 1e-6
    n_kv_heads: int | None = None
    sliding_from: int = 28
    mrope_sections: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    head_dim: int | None = None
    max_positions: int = 32768
    sliding_window: int | None = 4096
    slides: bool = False

    @property
    def entries(self) -> dict[str, Any]:
        """By their names in config.json."""
        return {
            "rms_norm_eps": self.rms_eps,
            "num_key_value_heads": self.n_kv_heads,
            "max_window_layers": self.sliding_from,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "sliding_window": self.sliding_window,
        }

    @property
    def fixed_entries(self) -> dict[str, Any]:
        """Entries that say this, whatever config.json has under these names of other families."""
        return {"use_sliding_window": True, "max_window_layers": 0} if self.slides else {}


@dataclass(frozen=True)
class LayerKind:
    """How attention of some layers differs from that of others.

    window: the last tokens that one attends to, itself included (arXiv:2004.05150); 0 is all. rotates: queries and keys
    are rotated by position; SmolLM3 leaves that out of each fourth layer (arXiv:2501.18795). rope: how, where that is
    not the model's.
    """

    window: int = 0
    rotates: bool = True
    rope: RopeConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model: its decoder, and its vision tower where it has one.

    qkv_bias: the products of queries, keys and values have biases. qk_norm: each head's queries and keys are
    normalised before they are rotated. norm_dtype: of the decoder's norms; None is the stage's dtype.
    tied_embeddings: the LM head's matrix is the embedding's. max_positions: tokens of a sequence. kinds: of each layer.
    intermediate_size: inner width of an MLP, in layers without experts. activation: of MLPs, as `Linear` has it.
    norm_offset: what is added to the stored weights of norms. post_norms: what attention and MLP add to hidden states
    is normalised before. embedding_scale: what rows of the embedding are multiplied by, rounded to their dtype.
    query_scale: what normalised queries are multiplied by, beside head_dim ** -0.5.
    """

    architecture: str
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    rope: RopeConfig
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_positions: int
    dtype: str
    kinds: tuple[LayerKind, ...]
    norm_dtype: str | None = None
    activation: str = "swiglu"
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float = 1.0
    experts: ExpertsConfig | None = None
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """How layers rotate: the model's way, then those that some have of their own."""
        return tuple(dict.fromkeys((self.rope, *(kind.rope for kind in self.kinds if kind.rope))))

    def rotation_of(self, layer: int) -> int | None:
        """Index in `ropes` of how a layer rotates; None where it does not."""
        kind = self.kinds[layer]
        return self.ropes.index(kind.rope or self.rope) if kind.rotates else None

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The experts of a layer; None where it has one MLP."""
        return self.experts if self.experts and layer in self.experts.layers else None

    @property
    def inner_sizes(self) -> dict[str, int]:
        """The inner widths of MLPs, by what messages call them."""
        experts = {"experts' intermediate size": self.experts.inner_size} if self.experts else {}
        all_mixed = self.experts is not None and len(self.experts.layers) == self.n_layers
        return experts if all_mixed else {"intermediate size": self.intermediate_size, **experts}

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        part: Mapping[str, Any] | None = None,
        *,
        defaults: DecoderDefaults = DecoderDefaults(),
        qkv_bias: bool = False,
        qk_norm: bool = False,
        unrotated_layers: Sequence[int] = (),
        experts: ExpertsConfig | None = None,
        vision: VisionConfig | None = None,
    ) -> ModelConfig:
        """Reads the entries of config.json that families share.

        part: the entries about the decoder, where they are not those of the top level. The other arguments are what a
        family says of itself. Raises CheckpointError, naming the entry, for one that is missing, wrong or contradicts
        another, and for what no family computes.
        """
        part = config if part is None else part
        where = "" if part is config else "text_config."
        top = TopEntries.read(config, CONFIG)
        content = {**defaults.entries, **part, **defaults.fixed_entries} if isinstance(part, dict) else part
        entries = DecoderEntries.read(content, CONFIG, where.removesuffix("."))
        head_dim = entries.head_dim or entries.hidden_size // entries.num_attention_heads
        rope, sliding_rope = decoder_ropes(part, defaults.rope_theta, where)
        most = entries.max_position_embeddings
        made = cls(
            architecture=top.architectures[0],
            hidden_size=entries.hidden_size,
            n_layers=entries.num_hidden_layers,
            n_heads=entries.num_attention_heads,
            n_kv_heads=entries.num_key_value_heads or entries.num_attention_heads,
            head_dim=head_dim,
            intermediate_size=entries.intermediate_size,
            vocab_size=entries.vocab_size,
            rms_eps=entries.rms_norm_eps,
            rope=_rope_config(rope, defaults, head_dim, most),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            tied_embeddings=top.tie_word_embeddings or (vision is not None and entries.tie_word_embeddings),
            max_positions=_max_positions(entries, rope),
            dtype=_dtype(top, entries),
            kinds=_layer_kinds(
                entries,
                unrotated_layers,
                _rope_config(sliding_rope, defaults, head_dim, most) if sliding_rope else None,
            ),
            activation=ACTIVATIONS.get(entries.hidden_act, ""),
            experts=experts,
            vision=vision,
        )
        _check_decoder(entries, made)
        check_ids(entries, entries.vocab_size, CONFIG, where.removesuffix("."))
        return made._with_media(MediaEntries.read(config, CONFIG)) if vision else made

    def _with_media(self, entries: MediaEntries) -> ModelConfig:
        """The same with the tokens that stand for images and videos, if the tower fits."""
        assert self.vision is not None
        if self.vision.out_size != self.hidden_size:
            raise unusable(
                f"the tower's output (vision_config) has {self.vision.out_size} numbers, the decoder {self.hidden_size}"
            )
        check_ids(entries, self.vocab_size, CONFIG)
        if entries.image_token_id == entries.video_token_id:
            raise unusable(f"image_token_id and video_token_id are both {entries.image_token_id}")
        return replace(
            self,
            image_token_id=entries.image_token_id,
            video_token_id=entries.video_token_id,
            vision_start_token_id=entries.vision_start_token_id,
            vision_end_token_id=entries.vision_end_token_id,
        )


@dataclass(frozen=True)
class StageSpec:
    """The part of a model that a stage has: decoder layers [first_layer, last_layer), half-open, and the ends.

    head: the final norm and the LM head. vision: the vision tower, with the embedding or on a node of its own.
    rank: the part of the layers and of the LM head that one rank of a group has; None is all of them.
    """

    first_layer: int
    last_layer: int
    embedding: bool = False
    vision: bool = False
    head: bool = False
    rank: Rank | None = None

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer)

    @classmethod
    def everything(cls, config: ModelConfig) -> StageSpec:
        """The whole model."""
        return cls(0, config.n_layers, embedding=True, vision=config.vision is not None, head=True)


def unusable(cause: str) -> CheckpointError:
    """The error for a config.json that contradicts itself or asks for what is not computed here."""
    return CheckpointError(f"{CONFIG}: {cause}")


def check_rope(kind: str, supported: tuple[str, ...]) -> None:
    """Raises CheckpointError for a kind of rotary positions that a decoder or tower does not compute."""
    if kind not in supported:
        raise unusable(f"RoPE scaling of type {kind!r} is not supported")


def _dtype(top: TopEntries, part: DecoderEntries) -> str:
    """That of the decoder where the top names none, as in transformers."""
    name = top.dtype or top.torch_dtype or part.dtype or part.torch_dtype or DTYPE_NAMES[0]
    if name not in DTYPE_NAMES:
        raise unusable(f"dtype {name!r} is not supported: set it to one of {', '.join(DTYPE_NAMES)}")
    return name


def _max_positions(entries: DecoderEntries, rope: RopeEntries) -> int:
    """As vLLM takes it: YaRN multiplies the length that the model was trained with."""
    most = entries.max_position_embeddings
    if rope.kind == "yarn" and rope.factor:
        most = max(most, round((rope.original_max_position_embeddings or most) * rope.factor))
    return most


def _rope_config(entries: RopeEntries, defaults: DecoderDefaults, head_dim: int, max_positions: int) -> RopeConfig:
    sections = defaults.mrope_sections
    check_rope(
        entries.kind, ("default", "linear", "llama3", "yarn") if sections is None else ("default", "mrope", "yarn")
    )
    if entries.partial_rotary_factor != 1:
        raise unusable(f"partial_rotary_factor is {entries.partial_rotary_factor:g}: only 1 is supported")
    scaling = _rope_scaling(entries, max_positions) if entries.kind in ("linear", "llama3", "yarn") else None
    if sections is None:
        return RopeConfig("default", entries.rope_theta, scaling=scaling)
    found = tuple(sections if entries.mrope_section is None else entries.mrope_section)
    if len(found) != 3 or sum(found) != head_dim // 2:
        source = "transformers' default " if entries.mrope_section is None else ""
        raise unusable(
            f"mrope_section is {source}{list(found)}: three numbers that add up to half of the head's {head_dim} "
            "channels are expected"
        )
    sizes = found[0], found[1], found[2]
    rope = RopeConfig("mrope", entries.rope_theta, sizes, scaling, defaults.mrope_interleaved)
    if tuple(rope.axes(head_dim // 2).bincount(minlength=3).tolist()) != sizes:
        raise unusable(
            f"mrope_section is {list(found)}: of {head_dim // 2} interleaved channels at most each third one is of "
            "height, and of width"
        )
    return rope


def _rope_scaling(entries: RopeEntries, max_positions: int) -> RopeScaling:
    """Raises CheckpointError, naming the entry, for one that the kind needs and that is missing."""
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
    for name in needed[entries.kind]:
        if getattr(entries, name) is None:
            raise unusable(f"RoPE scaling of type {entries.kind!r} needs {name}")
    low, high = entries.low_freq_factor or 1.0, entries.high_freq_factor or 4.0
    if entries.kind == "llama3" and low >= high:
        raise unusable(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    return RopeScaling(
        kind=entries.kind,  # type: ignore[arg-type]  # checked above
        factor=entries.factor or 1.0,
        trained_positions=entries.original_max_position_embeddings or max_positions,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=entries.beta_fast or 32.0,
        beta_slow=entries.beta_slow or 1.0,
        attention_factor=_attention_factor(entries),
        truncate=entries.truncate,
    )


def _attention_factor(entries: RopeEntries) -> float:
    """What YaRN multiplies cosines and sines by (arXiv:2309.00071, section 3.4); as in transformers."""
    if entries.kind != "yarn":
        return 1.0
    if entries.attention_factor is not None:
        return entries.attention_factor

    def magnitude(scale: float, by: float = 1.0) -> float:
        return 0.1 * by * math.log(scale) + 1.0 if scale > 1 else 1.0

    factor = entries.factor or 1.0
    if entries.mscale and entries.mscale_all_dim:
        return magnitude(factor, entries.mscale) / magnitude(factor, entries.mscale_all_dim)
    return magnitude(factor)


def _layer_kinds(
    entries: DecoderEntries, unrotated: Sequence[int], sliding_rope: RopeConfig | None
) -> tuple[LayerKind, ...]:
    """Raises CheckpointError for kinds of attention that are not computed."""
    kinds = entries.attention_kinds
    if len(kinds) != entries.num_hidden_layers:
        raise unusable(f"layer_types has {len(kinds)} entries, num_hidden_layers is {entries.num_hidden_layers}")
    if other := next((kind for kind in kinds if kind not in ATTENTION_KINDS), None):
        raise unusable(f"layers with {other} are not supported (layer_types)")
    if SLIDING in kinds and entries.sliding_window is None:
        raise unusable(f"layer_types has {SLIDING}, but sliding_window is missing")
    slides = [kind == SLIDING for kind in kinds]
    return tuple(
        LayerKind((entries.sliding_window or 0) * slid, layer not in unrotated, sliding_rope if slid else None)
        for layer, slid in enumerate(slides)
    )


def _check_decoder(entries: DecoderEntries, config: ModelConfig) -> None:
    """Raises CheckpointError where entries contradict each other, or ask for what the decoder does not compute."""
    for name in ("attention_bias", "mlp_bias"):
        if getattr(entries, name):
            raise unusable(f"{name} is set, which is not supported")
    if not config.activation:
        raise unusable(f"activation {entries.hidden_act!r} is not supported in the decoder")
    if config.n_heads % config.n_kv_heads:
        raise unusable(
            f"num_attention_heads {config.n_heads} is not a multiple of num_key_value_heads {config.n_kv_heads}"
        )
    if config.head_dim % 2:
        raise unusable(f"the head size {config.head_dim} (head_dim, or hidden_size / num_attention_heads) is odd")
