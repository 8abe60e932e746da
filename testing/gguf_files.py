"""Small GGUF files, written from checkpoints in Hugging Face layout as llama.cpp's converter does."""

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

from mdi.checkpoint.gguf import INNER, OUTER
from mdi.models.registry import read_config

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def write_gguf(checkpoint: Path, path: Path, kind: str, **entries: Any) -> Path:
    """kind: of matrices, one of `KINDS`; norms and biases are float32. entries: replace those of the file."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, config["model_type"] if config["model_type"] != "mistral" else "llama")
    _add_config(writer, config)
    _add_tokenizer(writer, checkpoint)
    for name, value in entries.items():
        writer.kv_data[0].pop(name, None)
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    if read_config(config).rope.scaling:
        writer.add_tensor("rope_freqs.weight", _divisors(config).numpy())
    stored = gguf.GGMLQuantizationType[kind]
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        made = _in_file_order(name, weight.float(), config).numpy()
        if made.ndim == 1:
            writer.add_tensor(_name_in_file(name), made)
        else:
            writer.add_tensor(_name_in_file(name), quantize(made, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    made = read_config(config)
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


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    added = tokenizer.get_added_tokens_decoder()
    tokens = [str(tokenizer.id_to_token(index)) for index in range(tokenizer.get_vocab_size())]
    kinds = [
        NORMAL if index not in added else CONTROL if added[index].special else USER_DEFINED
        for index in range(len(tokens))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_eos_token_id(tokens.index(settings["eos_token"]))
    writer.add_chat_template(settings["chat_template"])


def _name_in_file(name: str) -> str:
    outer = {new: old for old, new in OUTER.items()}
    inner = {new: old for old, new in INNER.items()}
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{inner[rest]}.{kind}"


def _in_file_order(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels: its converter reorders queries and keys of Llama."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = heads.get(name.split(".")[-2])
    if count is None or config["model_type"] not in ("llama", "mistral"):
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
    made: np.ndarray[Any, Any] = gguf.quants.dequantize(quantize(weight.float().numpy(), stored), stored)
    return torch.from_numpy(made)
