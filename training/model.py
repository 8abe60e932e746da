"""The architecture, and its forward pass over a training batch: transformers' modules, fed dense batches.

transformers' own forward attends to one picture at a time and to one conversation a sequence; here pictures of one
size go through the vision tower as one batch, and a sequence holds several branches that share its media.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mdi.layers.rope import vision_rotation
from mdi.media.patches import CLIP_MEAN, CLIP_STD
from training.cells import COLOR_NAMES, COLUMNS_PER_CELL, KIND_NAMES
from training.layout import MERGE, TEMPORAL
from training.samples import TrainingBatch
from training.scenes import LETTERS
from training.tokens import IGNORED, N_TEXT_TOKENS, SPECIAL, VOCAB_SIZE

N_CENTRES = 4
POINTING_LAYER, FINDING_LAYER = 3, 4  # the layer behind them answers
RARE = 3.0  # weight of the few cells that a question is about
N_PLACES = 8  # along a side of the picture
MAX_PICTURES = 4
ATTENTION = "branches"  # a name of our own among transformers' attention functions
LETTER_WEIGHT, PLACE_WEIGHT = 3.0, 0.3


def hub_config() -> dict[str, Any]:
    """config.json in the hub's flat form: 5.3 million parameters.

    rope_theta is small: a picture has 7 columns at most, and with Qwen's 1,000,000 an axis would hardly turn between
    two of them. With 10, nothing of a text could be matched 30 tokens further on. Text matches by the slowest 8 pairs.
    """
    ids = {text: N_TEXT_TOKENS + index for index, text in enumerate(SPECIAL)}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 8192,
        "max_window_layers": 5,
        "num_attention_heads": 6,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 12]},
        "sliding_window": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
        "vision_config": {
            "depth": 5,
            "embed_dim": 192,
            "hidden_size": 192,
            "mlp_ratio": 4,
            "num_heads": 6,
            "in_chans": 3,
            "in_channels": 3,
            "patch_size": TEMPORAL * 7,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": TEMPORAL * 7,
            "temporal_patch_size": TEMPORAL,
        },
    }


class Student(nn.Module):
    """The model in training, with heads that name what each cell of a picture shows and are thrown away at the end."""

    shift: Tensor
    scale: Tensor
    heads_alone = False  # what the grounding heads ask for reaches nothing but themselves

    def __init__(self) -> None:
        super().__init__()
        config = Qwen2VLConfig.from_dict(hub_config())
        self.hf = Qwen2VLForConditionalGeneration._from_config(
            config, attn_implementation=ATTENTION, dtype=torch.float32
        )
        width = config.text_config.hidden_size
        self.kinds = nn.Linear(width, len(KIND_NAMES))
        self.colors = nn.Linear(width, len(COLOR_NAMES))
        self.centres = nn.Linear(width, N_CENTRES)
        self.letters = nn.Linear(width, COLUMNS_PER_CELL * (1 + len(LETTERS)))
        self.pointers = nn.Linear(width, 2 * width)
        self.targets = nn.Linear(width, width)
        self.places = nn.Linear(width, MAX_PICTURES + 2 * N_PLACES)
        self.finders = nn.Linear(width, 2 * MAX_PICTURES * 2 * N_PLACES)
        self.pointing_bias = nn.Parameter(torch.full((), -2.0))
        mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
        area = TEMPORAL * 14 * 14
        self.register_buffer("shift", mean.repeat_interleave(area), persistent=False)
        self.register_buffer("scale", (1 / std).repeat_interleave(area), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.kinds.weight.device

    def freeze_vision(self) -> None:
        """Takes the vision tower as it is: it gets no gradient, and the cells are not asked for."""
        self.hf.model.visual.requires_grad_(False)

    def encode(self, batch: TrainingBatch) -> Tensor:
        """Media tokens [n, media * t, cells, width]."""
        if not batch.rows.numel():
            return self.kinds.weight.new_empty(len(batch.rows), 0, 0, self.kinds.in_features)
        visual = self.hf.model.visual
        n, n_media, n_rows, _ = batch.rows.shape
        rows, columns = (tokens * MERGE for tokens in batch.plan.grid)
        x = (batch.rows.view(-1, rows * columns, batch.rows.shape[-1]).float() / 255 - self.shift) * self.scale
        patch = visual.patch_embed.proj
        x = functional.linear(x, patch.weight.view(patch.weight.shape[0], -1))
        rotation = vision_rotation((1, rows, columns), MERGE, visual.blocks[0].attn.head_dim, x.device)
        cos = torch.cat((rotation.cos, rotation.cos), -1).to(x.dtype)
        sin = torch.cat((-rotation.sin, rotation.sin), -1).to(x.dtype)
        for block in visual.blocks:
            x = x + _attend(block.attn, block.norm1(x), cos, sin)
            x = x + block.mlp(block.norm2(x))
        merged: Tensor = visual.merger(x)  # [pictures * cells, width]
        return merged.view(n, n_media * n_rows // (rows * columns), batch.plan.grid[0] * batch.plan.grid[1], -1)

    def read(self, batch: TrainingBatch, media: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [answers, vocabulary] before each answer token, those tokens, where they are, grounding loss."""
        language = self.hf.model.language_model
        embeddings = language.embed_tokens(batch.ids)
        pads = (self.hf.config.image_token_id, self.hf.config.video_token_id)
        is_media = (batch.ids == pads[0]) | (batch.ids == pads[1])
        embeddings = embeddings.to(media.dtype).masked_scatter(is_media[..., None], media)
        hidden_from = torch.where(branch_mask(batch.branches), 0.0, -torch.inf).to(media.dtype)
        mask = {"full_attention": hidden_from[:, None].repeat(1, self.hf.config.text_config.num_attention_heads, 1, 1)}
        hidden = language(
            inputs_embeds=embeddings, position_ids=batch.positions, attention_mask=mask, use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
        grounding = self._grounding_loss(batch, hidden.hidden_states, is_media)
        at = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        logits = self.hf.lm_head(hidden.last_hidden_state[:, :-1][at])
        return logits, batch.labels[:, 1:][at], torch.stack(at), grounding

    def loss(self, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Of the answers and of grounding (zero where nothing is asked), and of the cells."""
        media = self.encode(batch)
        if not batch.plan.asks:
            return media.new_zeros(()), media.new_zeros(()), self._cell_loss(batch, media)
        logits, labels, at, grounding = self.read(batch, media)
        weights = batch.weights[:, 1:][at[0], at[1]]
        answers = (functional.cross_entropy(logits.float(), labels, reduction="none") * weights).sum() / weights.sum()
        return answers, grounding, self._cell_loss(batch, media)

    def _grounding_loss(self, batch: TrainingBatch, layers: tuple[Tensor, ...], is_media: Tensor) -> Tensor:
        """How badly a media token knows where it is, and the end of a question what it is about, and where that is."""
        known = batch.pointed >= 0
        if not known.any():
            return layers[0].new_zeros(())
        if self.heads_alone:
            layers = tuple(layer.detach() for layer in layers)
        hidden = layers[POINTING_LAYER]
        cells = hidden[is_media].view(len(hidden), -1, hidden.shape[-1])
        return (
            self._pointing_loss(batch, hidden, cells, known)
            + self._finding_loss(batch, layers[FINDING_LAYER])
            + PLACE_WEIGHT * self._place_loss(batch, cells)
        )

    def _finding_loss(self, batch: TrainingBatch, hidden: Tensor) -> Tensor:
        """In which rows and columns of which picture is it?"""
        found = self.finders(hidden[batch.asked[:, 0], batch.asked[:, 1]])
        found = found.view(-1, 2, MAX_PICTURES, 2, N_PLACES).float()
        pointed = batch.pointed.view(len(found), 2, -1, *batch.plan.grid)
        losses = []
        for axis, n_cells in enumerate(batch.plan.grid):
            true = pointed.amax(dim=4 - axis)  # [questions, 2, pictures, cells along the axis]
            guess = found[:, :, : true.shape[2], axis][..., _places(n_cells)]
            losses.append(
                functional.binary_cross_entropy_with_logits(guess[true >= 0], true[true >= 0], pos_weight=_rare(guess))
            )
        return torch.stack(losses).sum()

    def _pointing_loss(self, batch: TrainingBatch, hidden: Tensor, cells: Tensor, known: Tensor) -> Tensor:
        rows, ends = batch.asked.unbind(1)
        pointers = self.pointers(hidden[rows, ends]).unflatten(-1, (2, -1))
        scores = pointers @ self.targets(cells)[rows].mT * hidden.shape[-1] ** -0.5 + self.pointing_bias
        return functional.binary_cross_entropy_with_logits(
            scores[known].float(), batch.pointed[known], pos_weight=_rare(scores)
        )

    def _place_loss(self, batch: TrainingBatch, cells: Tensor) -> Tensor:
        rows, columns = batch.plan.grid
        n_pictures = cells.shape[1] // (rows * columns)
        sides = (MAX_PICTURES, N_PLACES, N_PLACES)
        place = torch.meshgrid(torch.arange(n_pictures), _places(rows), _places(columns), indexing="ij")
        guesses = self.places(cells).float().split(sides, dim=-1)
        losses = [
            functional.cross_entropy(guess.flatten(0, 1), true.flatten().repeat(len(cells)).to(guess.device))
            for guess, true in zip(guesses, place, strict=True)
        ]
        return torch.stack(losses).sum()

    def _cell_loss(self, batch: TrainingBatch, media: Tensor) -> Tensor:
        if batch.plan.kind == "easy" or not media.numel() or not media.requires_grad:
            return media.new_zeros(())
        kind, color, centres = batch.cells.flatten(0, 2).unbind(-1)
        cells = media.flatten(0, 2)
        shown = kind > 0
        loss = functional.cross_entropy(self.kinds(cells).float(), kind) + functional.cross_entropy(
            self.centres(cells).float(), centres
        )
        if shown.any():
            loss = loss + functional.cross_entropy(self.colors(cells[shown]).float(), color[shown])
        lettered = kind == KIND_NAMES.index("text")
        if lettered.any():
            letters = self.letters(cells[lettered]).float().unflatten(-1, (COLUMNS_PER_CELL, -1))
            written = functional.cross_entropy(letters.transpose(1, 2), batch.letters.flatten(0, 2)[lettered])
            loss = loss + LETTER_WEIGHT * written
        return loss


def _rare(like: Tensor) -> Tensor:
    return torch.full((), RARE, device=like.device)


def _places(n_cells: int) -> Tensor:
    """Where each of a row of cells is, from 0 to N_PLACES - 1."""
    return torch.linspace(0, N_PLACES - 1, n_cells).round().long()


def branch_mask(branches: Tensor) -> Tensor:
    """Attention mask, [n, T, T]: to earlier tokens of the same branch or of the trunk (0). Padding (-1) to padding."""
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    same = branches[:, :, None] == branches[:, None, :]
    return causal & (same | (branches == 0)[:, None, :])


def _attend(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Full attention within each picture; x: [pictures, patches, width]."""
    n, length, width = x.shape
    q, k, v = attention.qkv(x).view(n, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (_rotate(q, cos, sin) * q.shape[-1] ** -0.5) @ _rotate(k, cos, sin).transpose(-1, -2)
    out = scores.softmax(-1) @ v  # in bfloat16 on CPU several times as fast as a fused kernel
    projected: Tensor = attention.proj(out.transpose(1, 2).reshape(n, length, width))
    return projected


def _attend_branches(
    _: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    **rest: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """Grouped attention for transformers' layers; q: [n, heads, T, d], k, v: [n, groups, T, d], mask: [n, heads, T, T].

    Half the time of transformers' own: nothing is copied per head, nothing computed in float32.
    """
    n, n_heads, length, width = q.shape
    groups = (n * k.shape[1], -1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(mask.view(*groups, length), (q * scaling).reshape(*groups, width), k.mT)
    out = scores.softmax(-1) @ v
    return out.view(n, n_heads, length, width).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend_branches)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The sign of the swapped half is in `sin`."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
