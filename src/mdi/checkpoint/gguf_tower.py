"""Vision towers in `mmproj` files: what their entries and tensors are called on the hub.

Layout: the `gguf` package's constants (Keys.ClipVision, VisionProjectorType) and tensor_mapping.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mdi.checkpoint.gguf_file import GgufFile, GgufTensor
from mdi.core.errors import CheckpointError
from mdi.media.patches import CLIP_MEAN, CLIP_STD
from mdi.models.config import VisionConfig

IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
TEMPORAL_PATCH_SIZE = 2  # of each of these models: a tensor for either frame
MERGE_SIZE = 2  # where a file does not say
WINDOW_SIZE = 112
POSITIONS_PER_SECOND = 2  # of all published Qwen2.5-VL; not in the file
MERGER = {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
INNER = {"ln1": "norm1", "ln2": "norm2", "attn_qkv": "attn.qkv", "attn_out": "attn.proj"}
PATCHES = "v.patch_embd.weight"
FRAMES = (PATCHES, f"{PATCHES}.1")
POSITIONS = "v.position_embd.weight"
DEEPSTACK = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
FUSED = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Tower:
    """One kind of tower.

    architectures: of models that have it, by those of their decoders in GGUF. config: its `vision_config`. outer, mlp:
    names around the blocks, and of a block's MLP, in the file -> on the hub. pixels, video_pixels: the least and the
    most of an image where the file does not say, and of a video where its processor has limits of its own.
    """

    architectures: Mapping[str, str]
    config: Callable[[GgufFile], dict[str, Any]]
    outer: Mapping[str, str]
    mlp: Mapping[str, str]
    pixels: tuple[int, int]
    video_pixels: tuple[int, int] | None = None

    def place(self, tensor: GgufTensor, vision: VisionConfig) -> tuple[str, int]:
        """The name on the hub, and which part of that tensor it is. Raises CheckpointError for an unknown one.

        Older converters exchange the names of an MLP's two ends, which differ in their outputs.
        """
        if tensor.name in FRAMES:
            return "visual.patch_embed.proj.weight", FRAMES.index(tensor.name)
        module, _, kind = tensor.name.rpartition(".")
        if module in self.outer:
            return f"visual.{self.outer[module]}.{kind}", 0
        *block, part = module.split(".")
        if part in ("ffn_up", "ffn_down"):
            part = "ffn_down" if tensor.shape[0] == vision.width else "ffn_up"
        if len(block) == 3 and block[:2] == ["v", "blk"]:
            if part in FUSED:
                return f"visual.blocks.{block[2]}.attn.qkv.{kind}", FUSED.index(part)
            if found := (INNER | dict(self.mlp)).get(part):
                return f"visual.blocks.{block[2]}.{found}.{kind}", 0
        mergers = {f"v.deepstack.{number}": index for index, number in enumerate(vision.deepstack_blocks)}
        if ".".join(block) in mergers and part in DEEPSTACK:
            return f"visual.deepstack_merger_list.{mergers['.'.join(block)]}.{DEEPSTACK[part]}.{kind}", 0
        names = " and ".join(self.architectures.values())
        raise CheckpointError(f"the mmproj file has the tensor {tensor.name}, which {names} has not")


def tower_of(file: GgufFile, decoder: str) -> Tower:
    """The tower that an mmproj file holds, for a decoder of this architecture.

    Raises CheckpointError for another file, for a tower that is not supported, and one of another model.
    """
    if file.entries.get("general.architecture") != "clip":
        raise CheckpointError(
            f"{file.name} is no mmproj file: give --mmproj the file that was published beside the model"
        )
    kind = _kind(file)
    if kind not in TOWERS:
        raise CheckpointError(f"{file.name} has a vision tower {kind!r}: supported are {', '.join(TOWERS)}")
    tower = TOWERS[kind]
    if decoder not in tower.architectures:
        names = " and ".join(tower.architectures)
        raise CheckpointError(
            f"{file.name} is for models of the architecture {names}, not {decoder}: take the file that was published "
            "beside the model"
        )
    return tower


def _kind(file: GgufFile) -> str:
    return str(file.entries.get("clip.projector_type", file.entries.get("clip.vision.projector_type", "none")))


def processor_files(file: GgufFile) -> dict[str, dict[str, Any]]:
    """How images and videos are cut for a tower: the contents of its processors' files, by name."""
    entries, tower = file.entries, TOWERS[_kind(file)]
    cut = {
        "patch_size": _entry(file, "patch_size"),
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": entries.get("clip.vision.spatial_merge_size", MERGE_SIZE),
        "image_mean": entries.get("clip.vision.image_mean", list(CLIP_MEAN)),
        "image_std": entries.get("clip.vision.image_std", list(CLIP_STD)),
    }
    least = entries.get("clip.vision.image_min_pixels", tower.pixels[0])
    most = entries.get("clip.vision.image_max_pixels", tower.pixels[1])
    files = {IMAGES: {**cut, "min_pixels": least, "max_pixels": most}}
    if tower.video_pixels:
        least, most = tower.video_pixels
        files[VIDEOS] = {**cut, "size": {"shortest_edge": least, "longest_edge": most}}
    return files


def _entry(file: GgufFile, name: str) -> Any:
    try:
        return file.entries[f"clip.vision.{name}"]
    except KeyError:
        raise CheckpointError(f"{file.name} has no entry clip.vision.{name}: convert it anew") from None


def _shared_config(file: GgufFile) -> dict[str, Any]:
    activation = "gelu" if file.entries.get("clip.use_gelu") else "quick_gelu"
    return {
        "depth": _entry(file, "block_count"),
        "num_heads": _entry(file, "attention.head_count"),
        "patch_size": _entry(file, "patch_size"),
        "spatial_merge_size": file.entries.get("clip.vision.spatial_merge_size", MERGE_SIZE),
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "hidden_act": "silu" if file.entries.get("clip.use_silu") else activation,
    }


def _inner_size(file: GgufFile, part: str, width: int) -> int:
    """Of the MLPs, from their first tensor: the entry for it is wrong in many files."""
    outputs, inputs = _shape(file, f"v.blk.0.{part}.weight")
    return inputs if outputs == width else outputs


def _shape(file: GgufFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise CheckpointError(f"{file.name} lacks the tensor {name}: download it again")
    return file.tensors[name].shape


def _qwen2_vl(file: GgufFile) -> dict[str, Any]:
    width = _entry(file, "embedding_length")
    return _shared_config(file) | {
        "embed_dim": width,
        "hidden_size": _entry(file, "projection_dim"),
        "mlp_ratio": _inner_size(file, "ffn_up", width) // width,
    }


def _qwen2_5_vl(file: GgufFile) -> dict[str, Any]:
    width, depth, pattern = (_entry(file, name) for name in ("embedding_length", "block_count", "n_wa_pattern"))
    return _shared_config(file) | {
        "hidden_size": width,
        "out_hidden_size": _entry(file, "projection_dim"),
        "intermediate_size": _inner_size(file, "ffn_gate", width),
        "window_size": file.entries.get("clip.vision.window_size", WINDOW_SIZE),
        "fullatt_block_indexes": list(range(pattern - 1, min(depth, 1000), pattern)),
        "tokens_per_second": POSITIONS_PER_SECOND,
    }


def _qwen3_vl(file: GgufFile) -> dict[str, Any]:
    shared, width = _shared_config(file), _entry(file, "embedding_length")
    flags = file.entries.get("clip.vision.is_deepstack_layers", [])
    return shared | {
        "hidden_size": width,
        "out_hidden_size": _entry(file, "projection_dim"),
        "intermediate_size": _inner_size(file, "ffn_up", width),
        "num_position_embeddings": _shape(file, POSITIONS)[0],
        "deepstack_visual_indexes": [index for index, flag in enumerate(flags) if flag],
        "hidden_act": "gelu_pytorch_tanh" if shared["hidden_act"] == "gelu" else shared["hidden_act"],
    }


TOWERS = {
    "qwen2vl_merger": Tower(
        {"qwen2vl": "Qwen2VLForConditionalGeneration"},
        _qwen2_vl,
        MERGER,
        {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        (3136, 12845056),
    ),
    "qwen2.5vl_merger": Tower(
        {"qwen2vl": "Qwen2_5_VLForConditionalGeneration"},
        _qwen2_5_vl,
        MERGER,
        {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        (3136, 12845056),
    ),
    "qwen3vl_merger": Tower(
        {"qwen3vl": "Qwen3VLForConditionalGeneration", "qwen3vlmoe": "Qwen3VLMoeForConditionalGeneration"},
        _qwen3_vl,
        {
            "v.patch_embd": "patch_embed.proj",
            "v.position_embd": "pos_embed",
            "v.post_ln": "merger.norm",
            "mm.0": "merger.linear_fc1",
            "mm.2": "merger.linear_fc2",
        },
        {"ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"},
        (65536, 16777216),
        (4096, 25165824),
    ),
}
"""By `clip.projector_type`. Limits of pixels are those of all published models' processors."""
