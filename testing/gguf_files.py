"""Small GGUF files, written from checkpoints in Hugging Face layout as llama.cpp's converter does.

Names of tensors and entries are those of the `gguf` package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mdi.models.config import ModelConfig, VisionConfig
from mdi.models.decoder import EXPERTS
from mdi.models.registry import family_of, read_config

K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "qwen2_vl": "qwen2vl",
    "qwen2_5_vl": "qwen2vl",
    "qwen3_moe": "qwen3moe",
    "qwen3_vl": "qwen3vl",
    "qwen3_vl_moe": "qwen3vlmoe",
}
PROJECTORS = {
    "qwen2_vl": gguf.VisionProjectorType.QWEN2VL,
    "qwen2_5_vl": gguf.VisionProjectorType.QWEN25VL,
    "qwen3_vl": gguf.VisionProjectorType.QWEN3VL,
    "qwen3_vl_moe": gguf.VisionProjectorType.QWEN3VL,
}
VISUAL = "visual."
MERGER_PARTS = 3  # which the package counts as blocks
QWEN3_MERGER = {"merger.norm": "merger.ln_q", "merger.linear_fc1": "merger.mlp.0", "merger.linear_fc2": "merger.mlp.2"}
"""Parts of Qwen3-VL's merger that the converter calls as in Qwen2-VL."""

FLOAT32 = ("ffn_gate_inp.weight", "v.position_embd.weight")  # matrices that no type is chosen for


def write_gguf(checkpoint: Path, path: Path, kind: str, *, tensors_a_part: int = 0, **entries: Any) -> Path:
    """The decoder. kind: of matrices, one of `KINDS`, or of `K_QUANTS`, whose numbers are random ones.

    Norms and biases are float32. entries: replace those of the file. tensors_a_part: the model is split over several
    files. Returns the first.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_a_part)
    made = read_config(config)
    _add_config(writer, config.get("text_config", config), made)
    _add_tokenizer(writer, checkpoint)
    _replace(writer, entries)
    if made.rope.scaling and made.rope.scaling.kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _divisors(config).numpy())
    for name, weight in _stacked(_weights(checkpoint, config)).items():
        if not name.startswith(VISUAL):
            stored = weight + made.norm_offset if name.endswith("norm.weight") else _in_file_order(name, weight, config)
            _add(writer, _name_in_file(name, writer.arch, made), stored, kind)
    return min(path.parent.glob(f"{_written(writer, path).stem}*.gguf"))


def write_mmproj(checkpoint: Path, path: Path, kind: str, *, without: str = "", **entries: Any) -> Path:
    """The vision tower, for `write_gguf` of the same checkpoint. without: a tensor that is left out."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision = read_config(config).vision
    assert vision is not None
    writer = gguf.GGUFWriter(path, "clip")
    _add_vision_config(writer, checkpoint, config["model_type"], vision)
    _replace(writer, entries)
    for name, weight in _weights(checkpoint, config).items():
        if name.startswith(VISUAL):
            for own_name, part in _tower_parts(name, weight, vision).items():
                new_name = _name_of(own_name, gguf.MODEL_ARCH.MMPROJ, max(vision.depth, MERGER_PARTS))
                if new_name != without:
                    _add(writer, new_name, part, kind)
    return _written(writer, path)


def _weights(checkpoint: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    family = family_of(config["architectures"][0])
    weights = load_file(checkpoint / "model.safetensors")
    return {family.hub_name(name): weight.float() for name, weight in weights.items()}


def _stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with one tensor for all experts of a layer, in the order of their numbers."""
    made: dict[str, Any] = {}
    for name, weight in weights.items():
        stem, mark, rest = name.partition(EXPERTS)
        number, _, part = rest.partition(".")
        if mark:
            made.setdefault(f"{stem}{EXPERTS}{part}", {})[int(number)] = weight
        else:
            made[name] = weight
    return {
        name: torch.stack([found[index] for index in sorted(found)]) if isinstance(found, dict) else found
        for name, found in made.items()
    }


def _replace(writer: gguf.GGUFWriter, entries: dict[str, Any]) -> None:
    for name, value in entries.items():
        writer.kv_data[0].pop(name, None)
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(name, value, kind)


def _add(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, kind: str) -> None:
    """Where blocks do not fit a matrix, it is float16, as in llama.cpp's converter."""
    made, stored = weight.contiguous().numpy(), gguf.GGMLQuantizationType[kind]
    if made.ndim == 1 or name.endswith(FLOAT32):
        writer.add_tensor(name, made)
        return
    if made.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
        stored = gguf.GGMLQuantizationType.F16
    writer.add_tensor(
        name, _random_blocks(made, stored) if kind in K_QUANTS else quantize(made, stored), raw_dtype=stored
    )


def _random_blocks(weight: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Bytes of a K-quant of this shape, whose numbers are about as large. The package reads K-quants only."""
    inputs = weight.shape[-1]
    outputs = weight.size // inputs
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(outputs * inputs)
    blocks = generator.integers(0, 256, (outputs, inputs // size, block_bytes), dtype=np.uint8)
    scales = (weight.std() * generator.uniform(0.5, 1, (outputs, inputs // size, 2)) / 2**9).astype(np.float16)
    if kind == gguf.GGMLQuantizationType.Q6_K:  # its one scale is the last
        blocks[..., -2:] = scales[..., :1].view(np.uint8)
    else:  # a scale, and one of the minima
        blocks[..., :4] = scales.view(np.uint8)
    return blocks.reshape(*weight.shape[:-1], -1)


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any], made: ModelConfig) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(made.hidden_size)
    writer.add_block_count(made.n_layers)
    writer.add_feed_forward_length(made.intermediate_size)
    writer.add_head_count(made.n_heads)
    writer.add_head_count_kv(made.n_kv_heads)
    writer.add_key_length(made.head_dim)
    writer.add_value_length(made.head_dim)
    writer.add_rope_dimension_count(made.head_dim)
    writer.add_layer_norm_rms_eps(made.rms_eps)
    writer.add_rope_freq_base(made.rope.theta)
    writer.add_vocab_size(made.vocab_size)
    if made.rope.sections:
        writer.add_rope_dimension_sections([*made.rope.sections, 0])
    if made.rope.scaling and made.rope.scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(made.rope.scaling.factor)
    if made.post_norms:
        writer.add_sliding_window(config["sliding_window"])
    if made.experts:
        writer.add_expert_count(made.experts.count)
        writer.add_expert_used_count(made.experts.per_token)
        writer.add_expert_feed_forward_length(made.experts.inner_size)
    if made.vision and made.vision.timestamps:
        writer.add_num_deepstack_layers(len(made.vision.deepstack_blocks))


def _add_vision_config(writer: gguf.GGUFWriter, checkpoint: Path, model_type: str, vision: VisionConfig) -> None:
    pictures = json.loads((checkpoint / "preprocessor_config.json").read_text())
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTORS[model_type])
    writer.add_vision_projection_dim(vision.out_size)
    writer.add_vision_image_size(560)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.width)
    writer.add_vision_feed_forward_length(vision.mlp_size)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.n_heads)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean(pictures["image_mean"])
    writer.add_vision_image_std(pictures["image_std"])
    if "min_pixels" in pictures:
        writer.add_uint32(gguf.Keys.ClipVision.IMAGE_MIN_PIXELS, pictures["min_pixels"])
        writer.add_uint32(gguf.Keys.ClipVision.IMAGE_MAX_PIXELS, pictures["max_pixels"])
    if vision.whole_frame_blocks:
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision.whole_frame_blocks[0] + 1)
    if vision.timestamps:
        writer.add_vision_use_gelu(True)
        writer.add_vision_spatial_merge_size(vision.merge_size)
        writer.add_vision_is_deepstack_layers([index in vision.deepstack_blocks for index in range(vision.depth)])


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    added = tokenizer.get_added_tokens_decoder()
    tokens = [str(tokenizer.id_to_token(index)) for index in range(tokenizer.get_vocab_size())]
    kinds = [
        NORMAL if index not in added else CONTROL if added[index].special else USER_DEFINED
        for index in range(len(tokens))
    ]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokens.index(settings["eos_token"]))
    if "pad_token" in settings:
        writer.add_pad_token_id(tokens.index(settings["pad_token"]))
    writer.add_add_bos_token(False)
    writer.add_chat_template(settings["chat_template"])


def _name_in_file(name: str, arch: str, config: ModelConfig) -> str:
    [known] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch]
    return _name_of(name, known, config.n_layers)


def _name_of(name: str, arch: gguf.MODEL_ARCH, n_blocks: int) -> str:
    """As the package's map has it. A second frame's patches have a number behind the name."""
    stem, dot, frame = name.partition(".weight.")
    found = gguf.get_tensor_name_map(arch, n_blocks).get_name(
        stem + ".weight" * bool(dot) or name, (".weight", ".bias")
    )
    assert found is not None, name
    return f"{found}.{frame}" if dot else found


def _tower_parts(name: str, weight: torch.Tensor, vision: VisionConfig) -> dict[str, torch.Tensor]:
    """What the converter cuts and renames.

    Queries, keys and values are apart before Qwen3-VL, and there is a kernel for each frame of a patch. Qwen3-VL's
    mergers of features have the numbers of the blocks whose outputs they read.
    """
    if ".deepstack_merger_list." in name:
        _, _, number, part = name.split(".", 3)
        return {f"model.visual.deepstack_merger_list.{vision.deepstack_blocks[int(number)]}.{part}": weight}
    module, _, kind = name.removeprefix(VISUAL).rpartition(".")
    if module in QWEN3_MERGER:
        return {f"{VISUAL}{QWEN3_MERGER[module]}.{kind}": weight}
    if ".qkv." in name and not vision.timestamps:
        parts = weight.chunk(3)
        return {name.replace("qkv", letter): part for letter, part in zip("qkv", parts, strict=True)}
    if name == "visual.patch_embed.proj.weight":
        return {name: weight[:, :, 0], f"{name}.1": weight[:, :, 1]}
    return {name: weight}


def _in_file_order(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels: its converter reorders queries and keys of Llama."""
    if config["model_type"] not in ("llama", "mistral"):
        return weight
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    return weight.view(count, 2, len(weight) // count // 2, -1).transpose(1, 2).reshape(weight.shape)


def _divisors(config: dict[str, Any]) -> torch.Tensor:
    """What transformers' frequencies of a scaling are divided by."""
    made = LlamaConfig(**{key: value for key, value in config.items() if key != "architectures"})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](made, torch.device("cpu"))
    head_dim = read_config(config).head_dim
    divisors: torch.Tensor = 1.0 / config["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim) / scaled
    return divisors


def dequantised(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What a matrix is after it was written."""
    stored = gguf.GGMLQuantizationType[kind]
    if weight.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
        stored = gguf.GGMLQuantizationType.F16
    made: np.ndarray[Any, Any] = gguf.quants.dequantize(quantize(weight.float().numpy(), stored), stored)
    return torch.from_numpy(made)
