"""Random checkpoints in Hugging Face layout, tokenizer included, for tests and for measurements before a download."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from mdi.checkpoint.cache import Cache, mark_used
from mdi.checkpoint.new_folder import new_folder
from mdi.checkpoint.published import PUBLISHED
from mdi.checkpoint.safetensors import INDEX, SINGLE
from mdi.checkpoint.writer import write_safetensors
from mdi.core.dtypes import parse_dtype
from mdi.core.errors import CheckpointError
from mdi.core.progress import Progress, counter
from mdi.core.tensors import Specs, TensorSpec, total_bytes
from mdi.models.config import ModelConfig, StageSpec, VisionConfig
from mdi.models.registry import family_of, read_config
from mdi.models.weights import stage_specs

CHAT_TEMPLATE = """\
{%- if messages and messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML with vision parts: writes what the template of Qwen2-VL writes."""

RANDOM = "random:"  # before the name of a published model
_BLOCK = 1_048_573  # a prime: rows of no width line up when the random block is repeated


def is_random(path: Path) -> bool:
    """Whether a checkpoint's folder is one of random weights, which no calibration makes better."""
    return path.name.startswith(RANDOM)


def random_checkpoint(name: str, progress: Progress | None = None) -> Path:
    """The cache's random checkpoint with the shape of a published model, in bfloat16; written if it is not there.

    Raises CheckpointError for an unknown name, or when it does not fit into the cache or on the disk.
    """
    if name not in PUBLISHED:
        raise CheckpointError(f"there is no random checkpoint {name!r}: the names are {', '.join(PUBLISHED)}")
    cache, config = Cache.open(), PUBLISHED[name]
    cache.check()
    folder = cache.folder / f"{RANDOM}{name}"
    if not folder.exists():
        size_bytes = total_bytes(_all_specs(read_config(config), "bfloat16").values())
        cache.make_room(size_bytes)
        count = counter(progress, f"writing {RANDOM}{name}", size_bytes)
        with new_folder(folder, size_bytes, f"the weights of {RANDOM}{name}") as unfinished:
            write_random_checkpoint(unfinished, config, dtype="bfloat16", count=count)
    mark_used(folder)
    return folder


def write_random_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str = "float32",
    std: float | None = None,
    shards: int = 1,
    count: Callable[[int], None] = lambda _: None,
) -> Path:
    """Writes a folder that transformers loads like the hub's: weights, configs, tokenizer. Returns `path`.

    config: a config.json as on the hub.
    std: of the matrices; by default 1/sqrt(inputs), which keeps activations near 1 at any width. Norms scale by
    about 1 and biases are near 0, none exactly, so that a forgotten one shows.
    shards: files the weights are spread over. count: called with the bytes of each tensor written. Needs memory for
    one tensor, whatever the model's size.
    """
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", {**config, "torch_dtype": dtype})
    made = read_config(config)
    _write_weights(path, made, _RandomTensors(seed, std, 1 - made.norm_offset), dtype, shards, count)
    flat = {**config.get("text_config", {}), **config}
    _write_generation_config(path, flat)
    _write_tokenizer(path, flat)
    if made.vision:
        _write_preprocessor_configs(path, made.vision)
    return path


class _RandomTensors:
    """Random tensors cut from one repeated block of normal numbers: made as fast as memory is written.

    norm: what the weights of norms are near.
    """

    def __init__(self, seed: int, std: float | None, norm: float) -> None:
        self.std = std
        self.norm = norm
        self._generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(_BLOCK, generator=self._generator)

    def draw(self, name: str, spec: TensorSpec) -> Tensor:
        shape = spec.shape
        center = self.norm if len(shape) == 1 and name.endswith("weight") else 0.0
        spread = 0.1 if len(shape) == 1 else self.std or 1 / math.sqrt(math.prod(shape[1:]))
        start, length = int(torch.randint(_BLOCK, (), generator=self._generator)), math.prod(shape)
        numbers = self._block[start : start + length]
        if len(numbers) < length:
            numbers = torch.cat((numbers, self._block[: min(start, length - len(numbers))]))
        return _repeat((numbers * spread + center).to(parse_dtype(spec.dtype)), length).view(shape)


def _repeat(block: Tensor, length: int) -> Tensor:
    out = torch.empty(length, dtype=block.dtype)
    for start in range(0, length, len(block)):
        out[start : start + len(block)] = block[: length - start]
    return out


def _all_specs(config: ModelConfig, dtype: str) -> Specs:
    return stage_specs(config, StageSpec.everything(config), dtype)


def _write_weights(
    path: Path, config: ModelConfig, random: _RandomTensors, dtype: str, shards: int, count: Callable[[int], None]
) -> None:
    file_name = family_of(config.architecture).file_name
    specs = {file_name(name): spec for name, spec in _all_specs(config, dtype).items()}
    files = [f"model-{index:05}-of-{shards:05}.safetensors" for index in range(1, shards + 1)]
    weight_map: dict[str, str] = {}
    for file, part in zip([SINGLE] if shards == 1 else files, _split(specs, shards), strict=True):
        write_safetensors(path / file, part, (random.draw(name, part[name]) for name in part), {"format": "pt"}, count)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        size = total_bytes(specs.values())
        _write_json(path / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _split(specs: Specs, parts: int) -> list[Specs]:
    """About as many names for each part; none is empty when there are enough names."""
    names = list(specs)
    cuts = [len(names) * part // parts for part in range(parts + 1)]
    return [{name: specs[name] for name in names[start:end]} for start, end in pairwise(cuts)]


def _write_generation_config(path: Path, config: Mapping[str, Any]) -> None:
    """Greedy, as the instruct models are in effect (they ship top_k 1)."""
    end, padding = _end_id(config), config["bos_token_id"]
    settings = {
        "bos_token_id": padding,
        "pad_token_id": padding,
        "eos_token_id": [end, padding],
        "do_sample": False,
    }
    _write_json(path / "generation_config.json", settings)


def _write_preprocessor_configs(path: Path, vision: VisionConfig) -> None:
    """As in Qwen2-VL; where videos have times, as in Qwen3-VL."""
    cut = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
    }
    images = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    if not vision.timestamps:
        scale = {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        settings = {**images, "min_pixels": 3136, "max_pixels": 12845056, **cut, **scale}
        _write_json(path / "preprocessor_config.json", settings)
        return
    images["processor_class"] = "Qwen3VLProcessor"
    videos = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
    for name, kind, (least, most) in (
        ("preprocessor_config.json", images, (65536, 16777216)),
        ("video_preprocessor_config.json", videos, (4096, 25165824)),
    ):
        size = {"shortest_edge": least, "longest_edge": most}
        scale = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        _write_json(path / name, {**kind, "size": size, **cut, **scale})


def _write_tokenizer(path: Path, config: Mapping[str, Any]) -> None:
    """Byte-level BPE without merges: token 65 is "A". Open ids get filler texts."""
    special = _special_ids(config)
    vocabulary = _byte_characters() | special
    open_ids = set(range(max(special.values()))) - set(vocabulary.values())
    vocabulary |= {f"<{index}>": index for index in open_ids}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": config["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", settings)


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE's character for each byte: printable ones are themselves, others from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = [byte for byte in range(256) if byte not in printable.values()]
    return printable | dict(zip(alphabet[len(printable) :], others, strict=True))


def _end_id(config: Mapping[str, Any]) -> int:
    """Of several, the last: that of a turn."""
    end = config["eos_token_id"]
    return int(end[-1] if isinstance(end, list) else end)


def _special_ids(config: Mapping[str, Any]) -> dict[str, int]:
    """Where the config puts the special tokens. <|im_start|> precedes <|im_end|>, as in Qwen."""
    keys = {
        "<|endoftext|>": "bos_token_id",
        "<|im_end|>": "eos_token_id",
        "<|vision_start|>": "vision_start_token_id",
        "<|vision_end|>": "vision_end_token_id",
        "<|vision_pad|>": "vision_token_id",
        "<|image_pad|>": "image_token_id",
        "<|video_pad|>": "video_token_id",
    }
    config = {**config, "eos_token_id": _end_id(config)}
    ids = {text: int(config[key]) for text, key in keys.items() if key in config}
    return dict(sorted((ids | {"<|im_start|>": ids["<|im_end|>"] - 1}).items(), key=lambda item: item[1]))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
