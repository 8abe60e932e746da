"""Checkpoints in one GGUF file: a `Source` whose tensors are dequantised as they are read, and the files beside them.

config.json and the tokenizer's files are written into a folder of the cache, which stands for the checkpoint; the
weights stay where they are. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdi.checkpoint.cache import Cache
from mdi.checkpoint.gguf_tokenizer import write_tokenizer
from mdi.checkpoint.json_file import read_json
from mdi.checkpoint.new_folder import new_folder
from mdi.core.errors import CheckpointError
from mdi.core.quantization import INT4, UNQUANTIZED, ModelQuantization, Quantization, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.layers.rope import RopeScaling
from mdi.models.config import ModelConfig
from mdi.models.entries import CONFIG
from mdi.models.registry import read_config

SUFFIX = ".gguf"
LINK = "model.gguf"
"""In the checkpoint's folder, where its file is."""

SMALL_BYTES = 64_000_000  # of a tokenizer's files, at most
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of modules: in the file -> on the hub."""

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
PERMUTED = ("llama",)  # whose queries and keys llama.cpp stores in the order of its rotation
FREQUENCIES = "rope_freqs.weight"
LLAMA3_POSITIONS = 8192


@dataclass(frozen=True)
class GgufSource:
    """A `Source` of one GGUF file. path: the folder with config.json, the tokenizer, and a link to the file."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> GgufSource:
        """Raises CheckpointError for an architecture that is not supported, or a damaged file."""
        source = cls(path, read_json(path / CONFIG))
        _ = source.model_config, source._tensors
        return source

    @cached_property
    def model_config(self) -> ModelConfig:
        return read_config(self.config)

    @property
    def home(self) -> Path:
        return self.path

    @property
    def quantization(self) -> ModelQuantization:
        return UNQUANTIZED

    @property
    def files(self) -> tuple[Path, ...]:
        return self.path / CONFIG, self.path / LINK

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(tuple(reversed(self._stored(name).shape.tolist())), "float32")

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantised: float32."""
        from gguf.quants import dequantize

        stored = self._stored(name)
        with _damage_named(self.path / LINK):
            made = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
            return self._in_our_order(name, made.view(self.spec(name).shape))

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor | None:
        """Q4_0 is int4: groups of 32 with a float16 scale, and 8 for zero. Only the order of the integers differs."""
        stored = self._stored(name)
        if quantization != INT4 or stored.tensor_type.name != "Q4_0":
            return None
        outputs, inputs = self.spec(name).shape
        with _damage_named(self.path / LINK):
            blocks = torch.from_numpy(stored.data.copy()).view(outputs, inputs // 32, 18)
            scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
            bytes_ = blocks[..., 2:]  # number i in the low half of byte i, number 16 + i in its high half
            numbers = torch.cat((bytes_ & 15, bytes_ >> 4), -1).view(outputs, inputs)
            values = numbers[:, ::2] | numbers[:, 1::2] << 4
            return QuantizedTensor(INT4, self._in_our_order(name, values), self._in_our_order(name, scales))

    @property
    def has_int4(self) -> bool:
        """Whether some of its matrices are int4 as they are."""
        return any(tensor.tensor_type.name == "Q4_0" for tensor in self._tensors.values())

    def _stored(self, name: str) -> Any:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"the file lacks the tensor {name}: download it again, or convert the model anew"
            ) from None

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        """By their names on the hub. Raises CheckpointError for one that no family has."""
        found = {}
        for tensor in opened(self.path / LINK).tensors:
            if tensor.name != FREQUENCIES:
                found[_name_on_hub(tensor.name)] = tensor
        return found

    def _in_our_order(self, name: str, weight: Tensor) -> Tensor:
        """Undoes llama.cpp's order of queries' and keys' rows: pairs of channels there, halves of a head here."""
        heads = {"q_proj": self.model_config.n_heads, "k_proj": self.model_config.n_kv_heads}
        count = heads.get(name.split(".")[-2])
        if count is None or self.config["model_type"] not in PERMUTED:
            return weight
        return weight.view(count, len(weight) // count // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def gguf_folder(file: Path) -> Path:
    """The folder that stands for a GGUF file; written if it is not there. Raises CheckpointError for a damaged file."""
    file = file.resolve()
    stat = file.stat()
    mark = hashlib.sha256(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    cache = Cache.open()
    cache.check()
    folder = cache.folder / f"{file.stem}-{mark}"
    if not (folder / CONFIG).exists():
        reader = opened(file)
        with _damage_named(file):
            fields = {name: field.contents() for name, field in reader.fields.items()}
            config = _config(fields, {tensor.name: tensor for tensor in reader.tensors})
        read_config(config)
        with new_folder(folder, SMALL_BYTES, f"the tokenizer of {file.name}") as unfinished:
            with _damage_named(file):
                write_tokenizer(unfinished, file, fields)
            (unfinished / CONFIG).write_text(json.dumps(config, indent=2))
            (unfinished / LINK).symlink_to(file)
    return folder


def opened(file: Path) -> Any:
    """The file as the `gguf` package reads it. Raises CheckpointError for one that is damaged or cut off."""
    from gguf import GGUFReader

    with _damage_named(file):
        with file.open("rb") as start:
            if start.read(4) != b"GGUF":
                raise CheckpointError(f"{file.resolve().name} is no GGUF file: download it again")
        return GGUFReader(file)


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Any error of reading as CheckpointError: the package trusts what a file says of itself."""
    name = file.resolve().name
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror})") from None
    except Exception as error:
        kind = type(error).__name__
        raise CheckpointError(f"{name} is damaged or cut off ({kind}: {error}): download it again") from None


def _name_on_hub(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    parts = module.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in INNER:
        return f"model.layers.{parts[1]}.{INNER[parts[2]]}.{kind}"
    raise CheckpointError(f"the file has the tensor {name}, which no supported model has")


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, from the file's own entries."""
    kind = str(fields.get("general.architecture", "none"))
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF files of the architecture {kind!r} are not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if int(fields.get("split.count", 1)) > 1:
        raise CheckpointError("the model is split over several GGUF files: join them (llama-gguf-split --merge)")
    architecture, model_type = ARCHITECTURES[kind]

    def entry(name: str, default: Any = None) -> Any:
        found = fields.get(f"{kind}.{name}", default)
        if found is None:
            raise CheckpointError(f"the GGUF file has no entry {kind}.{name}: convert the model anew")
        return found

    heads = entry("attention.head_count")
    head_dim = entry("attention.key_length", entry("embedding_length") // heads)
    if entry("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError("the GGUF file rotates a part of each head only, which is not supported")
    embedding = tensors.get("token_embd.weight")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": entry("embedding_length"),
        "intermediate_size": entry("feed_forward_length"),
        "num_hidden_layers": entry("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": entry("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": entry("context_length"),
        "rms_norm_eps": entry("attention.layer_norm_rms_epsilon"),
        "vocab_size": int(embedding.shape[1]) if embedding is not None else entry("vocab_size"),
        "rope_parameters": _rope(entry, tensors.get(FREQUENCIES), head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "bfloat16",
    }


def _rope(entry: Callable[..., Any], divisors: Any, head_dim: int) -> dict[str, Any]:
    """`rope_parameters`. divisors: the tensor that divides the frequencies, which files of Llama 3.1 and later have."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": entry("rope.freq_base", 10000.0)}
    scaling = entry("rope.scaling.type", "none")
    if divisors is not None:
        return rope | _llama3_scaling(torch.from_numpy(divisors.data.copy()), rope["rope_theta"], head_dim)
    if scaling == "none":
        return rope
    rope |= {"rope_type": scaling, "factor": entry("rope.scaling.factor", 1.0)}
    if original := entry("rope.scaling.original_context_length", 0):
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3_scaling(divisors: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that gives these divisors. All models of Llama 3 have the same bounds; factors differ."""
    scaling = RopeScaling("llama3", float(divisors.max()), LLAMA3_POSITIONS)
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    made = frequencies / scaling.applied(frequencies, theta)
    if made.shape != divisors.shape or not torch.allclose(made, divisors.float(), rtol=1e-3):
        raise CheckpointError(f"the file scales positions by a {FREQUENCIES} that is not Llama 3's: not supported")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": LLAMA3_POSITIONS,
    }
