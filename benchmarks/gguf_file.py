"""Writes the language model of a checkpoint as a GGUF file for llama.cpp: BF16, Q8_0 or Q4_0, with the same weights.

The embedding has the type of the matrices, so that a tied head has it too. Norms and biases are float32. There is no
vocabulary: llama.cpp is given token ids.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape, quantize
from rich.progress import track

from mdi.checkpoint import gguf as reader
from mdi.checkpoint.source import Source, open_source
from mdi.core.dtypes import parse_dtype
from mdi.models.config import ModelConfig

ARCHITECTURES = {"qwen2_vl": "qwen2vl", "qwen2": "qwen2"}  # of config.json -> of llama.cpp
OUTER = {f"{here}.weight": f"{there}.weight" for there, here in reader.OUTER.items()}
INNER = {here: there for there, here in reader.INNER.items()}


def gguf_file(checkpoint: Path, kind: str) -> Path:
    """The checkpoint's GGUF file of a type, "BF16", "Q8_0" or "Q4_0", in its folder `gguf`; written if not there."""
    path = checkpoint / "gguf" / f"{kind}.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        write_gguf(open_source(checkpoint), unfinished, kind)
        unfinished.rename(path)
    return path


def write_gguf(source: Source, path: Path, kind: str) -> None:
    """Writes the file, with a progress bar. Needs memory for the largest tensor in float32, three times."""
    writer = gguf.GGUFWriter(path, ARCHITECTURES[source.config["model_type"]])
    _add_config(writer, source.model_config)
    names = _names(source)
    for name, new in names.items():
        shape = source.spec(name).shape
        stored = _stored(shape, kind)
        if stored == gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(new, shape, np.dtype(np.float32), 4 * prod(shape), stored)
        else:
            shape = quant_shape_to_byte_shape(shape, stored)
            writer.add_tensor_info(new, shape, np.dtype(np.uint8), prod(shape), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in track(names, f"writing {path.stem}.gguf"):
        stored = _stored(source.spec(name).shape, kind)
        writer.write_tensor_data(quantize(source.tensor(name).to(parse_dtype("float32")).numpy(), stored))
    writer.close()


def _stored(shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType[kind]


def _names(source: Source) -> dict[str, str]:
    """Names of the language model's tensors: in the checkpoint -> in the file."""
    return {name: new for name in sorted(source.names()) if (new := _renamed(name))}


def _renamed(name: str) -> str | None:
    """None for a tensor that is not the language model's."""
    if not name.startswith("model.layers."):
        return OUTER.get(name)
    _, _, layer, rest = name.split(".", 3)
    inner, _, part = rest.rpartition(".")
    return f"blk.{layer}.{INNER[inner]}.{part}"


def _add_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if sections := config.rope.sections:
        writer.add_rope_dimension_sections([*sections, 0])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
