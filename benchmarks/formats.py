"""The numeric types that the benchmarks compare: ours, llama.cpp's of the same class, and the targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testing.checkpoints import tiny_config

from mdi.checkpoint.published import QWEN2_05B, QWEN2_VL_2B, QWEN2_VL_7B, TINY_LLAMA
from mdi.checkpoint.random_weights import RANDOM, write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.quantization import NONE, UNQUANTIZED, ModelQuantization
from mdi.core.tensors import TensorSpec, total_bytes, total_size
from mdi.models.config import StageSpec
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.weights import stage_specs

TINY_2B = tiny_config(
    vocab_size=288, hidden_size=128, intermediate_size=256, num_attention_heads=8
)  # of whole groups of weights
CUT_7B = QWEN2_VL_7B | {"num_hidden_layers": 8, "vision_config": QWEN2_VL_7B["vision_config"] | {"depth": 1}}
"""Exact layers and head, but 8 of 28 layers and 1 of 32 blocks of the tower: 6 GB in bfloat16 instead of 17."""

SHAPES: dict[str, dict[str, Any]] = {
    "2b": QWEN2_VL_2B,
    "7b": CUT_7B,
    "0.5b": QWEN2_05B,
    "tinyllama": TINY_LLAMA,
    "tiny": TINY_2B,
}


@dataclass(frozen=True)
class Format:
    """One numeric type: of layers, head and, where `image` has a target, the vision tower. gguf: llama.cpp's.

    Targets: decode's ratio to llama.cpp and its share of the roofline; prefill and image to transformers in bfloat16.
    """

    name: str
    quantization: ModelQuantization
    gguf: str
    decode: float
    roofline: float
    prefill: float
    image: float | None


FORMATS = {
    format_.name: format_
    for format_ in (
        Format("bf16", UNQUANTIZED, "BF16", 1.3, 0.8, 1.05, 1.2),
        Format("int8", ModelQuantization("int8", "int8", "int8"), "Q8_0", 1.6, 0.8, 1.8, 1.8),
        Format("int4", ModelQuantization("int4", "int4"), "Q4_0", 1.4, 0.7, 1.6, None),
    )
}


def random_checkpoint(folder: Path, shape: str) -> Path:
    """The random checkpoint of a shape in bfloat16, written if it is not there."""
    path = folder / f"{RANDOM}{shape}"
    if not path.exists():
        print(f"writing {path}")
        unfinished = folder / f"unfinished-{shape}"
        write_random_checkpoint(unfinished, SHAPES[shape], dtype="bfloat16", std=0.02)
        unfinished.rename(path)
    return path


def token_bytes(path: Path, format_: Format) -> int:
    """Bytes of the weights that every token needs: all layers and the head."""
    return total_bytes(_token_specs(path, format_))


def token_operations(path: Path, format_: Format) -> int:
    """Multiplications and sums of a token in these weights."""
    return 2 * total_size(_token_specs(path, format_))


def _token_specs(path: Path, format_: Format) -> list[TensorSpec]:
    config = open_source(path).model_config
    everything = StageSpec.everything(config)
    specs = stage_specs(config, everything, "bfloat16", format_.quantization)
    head = LM_HEAD if LM_HEAD in specs else EMBEDDING
    return [spec for name, spec in specs.items() if name.startswith("model.layers.") or name == head]


def engine_settings(format_: Format) -> dict[str, Any]:
    """An engine's settings for it."""
    formats = format_.quantization
    return {"quantization": formats.layers or NONE, "vision_quantization": formats.vision or NONE}
