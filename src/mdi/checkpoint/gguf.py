"""Checkpoints in GGUF files: a `Source` whose tensors are dequantised as they are read, and the files beside them.

config.json and the tokenizer's files are written into a folder of the cache, which stands for the checkpoint; the
weights stay where they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdi.checkpoint.cache import Cache
from mdi.checkpoint.gguf_config import FREQUENCIES, hub_config
from mdi.checkpoint.gguf_file import GgufFile, GgufTensor, parts_of, read_parts
from mdi.checkpoint.gguf_formats import EXACT, as_stored, has_one_format, nearest_format
from mdi.checkpoint.gguf_tokenizer import write_tokenizer
from mdi.checkpoint.gguf_tower import TOWERS, processor_files
from mdi.checkpoint.json_file import read_json
from mdi.checkpoint.new_folder import new_folder
from mdi.core.errors import CheckpointError
from mdi.core.quantization import INT4_MINIMUMS, ModelQuantization, Quantization, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, EXPERTS, LAYERS, LM_HEAD
from mdi.models.entries import CONFIG
from mdi.models.registry import read_config
from mdi.models.weights import stage_specs

LINK, MMPROJ_LINK = "model.gguf", "mmproj.gguf"
"""In the checkpoint's folder, where its files are. Further parts are model.part00002.gguf and so on."""

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
    "ffn_gate_inp": "mlp.gate",
}
"""Names of modules: in the file -> on the hub."""

POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""The same of layers that normalise what attention and MLP add."""

NORM = "norm.weight"  # how the names of norms end

STACKED = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Tensors of all experts of a layer: in the file -> of each, on the hub."""

ROUTER = ".mlp.gate.weight"  # which is not quantised

PERMUTED = ("llama",)  # whose queries and keys llama.cpp stores in the order of its rotation
PATCHES = "visual.patch_embed.proj.weight"
POSITIONS = "pos_embed.weight"


@dataclass(frozen=True)
class GgufSource:
    """A `Source` of GGUF files. path: the folder with config.json, the tokenizer, and links to the files."""

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
    def files(self) -> tuple[Path, ...]:
        return (self.path / CONFIG, *self._links, *self.path.glob(MMPROJ_LINK))

    @cached_property
    def quantization(self) -> ModelQuantization:
        layers, head, vision = map(nearest_format, self._matrices)
        return ModelQuantization(layers, head, vision)

    @property
    def is_exact(self) -> bool:
        return all(map(has_one_format, self._matrices))

    @property
    def _matrices(self) -> tuple[list[GgufTensor], list[GgufTensor], list[GgufTensor]]:
        """Of decoder layers, LM head and vision tower: those that have formats."""
        matrices = {
            name: parts
            for name, parts in self._tensors.items()
            if len(parts[0].shape) > 1 and not name.endswith((ROUTER, POSITIONS))
        }

        def of(prefix: str) -> list[GgufTensor]:
            return [part for name, parts in matrices.items() if name.startswith(prefix) for part in parts]

        return of(LAYERS), matrices.get(LM_HEAD) or matrices.get(EMBEDDING, []), of("visual.")

    @property
    def has_int4(self) -> bool:
        """Whether some of its matrices have 4 bits as they are."""
        return any(part.kind in EXACT[INT4_MINIMUMS.name] for parts in self._tensors.values() for part in parts)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        first, *others = self._stored(name)
        if name == PATCHES:
            return TensorSpec((*first.shape[:2], 1 + len(others), *first.shape[2:]), "float32")
        return TensorSpec((first.shape[0] + sum(part.shape[0] for part in others), *first.shape[1:]), "float32")

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantised: float32."""
        with _damage_named(self.path / LINK):
            parts = [part.floats() for part in self._stored(name)]
            if name == PATCHES:  # one kernel for either frame
                return torch.stack(parts, 2)
            whole = self._in_our_order(name, torch.cat(parts))
            return whole - self.model_config.norm_offset if name.endswith(NORM) else whole  # added in the file

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor | None:
        with _damage_named(self.path / LINK):
            parts = [as_stored(part, quantization) for part in self._stored(name)]
            if not all(parts):
                return None
            fields = ("values", "scales", "minimums") if quantization.minimums else ("values", "scales")
            joined = {field: torch.cat([getattr(part, field) for part in parts]) for field in fields}
            ordered = {field: self._in_our_order(name, tensor) for field, tensor in joined.items()}
            return QuantizedTensor(quantization, **ordered)

    def _stored(self, name: str) -> list[GgufTensor]:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"the file lacks the tensor {name}: download it again, or convert the model anew"
            ) from None

    @cached_property
    def _tensors(self) -> dict[str, list[GgufTensor]]:
        """What each tensor of the hub is made of. Raises CheckpointError for one that the model does not have."""
        model = read_parts(self._links)
        stored = [tensor for name, tensor in model.tensors.items() if name != FREQUENCIES]
        config = self.model_config
        inner = INNER | POST_NORMS if config.post_norms else INNER
        found = {name: [part] for tensor in stored for name, part in _on_hub(tensor, inner)} | self._tower
        expected = stage_specs(config, StageSpec.everything(config), "float32")  # for the names alone
        if left_over := found.keys() - expected.keys():
            architecture = config.architecture
            raise CheckpointError(f"{architecture} has no tensor {min(left_over)}, which the file has: not supported")
        return found

    @property
    def _tower(self) -> dict[str, list[GgufTensor]]:
        if self.model_config.vision is None:
            return {}
        architecture = self.model_config.architecture
        [tower] = [tower for tower in TOWERS.values() if architecture in tower.architectures.values()]
        parts: dict[str, dict[int, GgufTensor]] = {}
        for tensor in GgufFile.read(self.path / MMPROJ_LINK).tensors.values():
            name, index = tower.place(tensor, self.model_config.vision)
            parts.setdefault(name, {})[index] = tensor
        return {name: [found[index] for index in sorted(found)] for name, found in parts.items()}

    @property
    def _links(self) -> list[Path]:
        return sorted(self.path.glob("model*.gguf"))

    def _in_our_order(self, name: str, weight: Tensor) -> Tensor:
        """Undoes llama.cpp's order of queries' and keys' rows: pairs of channels there, halves of a head here."""
        heads = {"q_proj": self.model_config.n_heads, "k_proj": self.model_config.n_kv_heads}
        count = heads.get(name.split(".")[-2])
        if count is None or self.config["model_type"] not in PERMUTED:
            return weight
        return weight.view(count, len(weight) // count // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def gguf_folder(file: Path, mmproj: Path | None = None) -> Path:
    """The folder that stands for a GGUF file; written if it is not there.

    file: the first of a model that is split over several. mmproj: the file with its vision tower. Raises
    CheckpointError for a damaged file, for one that is missing, and for a tower of another model.
    """
    files = parts_of(file.resolve())
    tower = [mmproj.resolve()] if mmproj else []
    if tower and not tower[0].is_file():
        raise CheckpointError(f"there is no mmproj file {str(mmproj)!r}")
    cache = Cache.open()
    cache.check()
    folder = cache.folder / f"{file.stem}-{_mark([*files, *tower])}"
    if not (folder / CONFIG).exists():
        model, projector = read_parts(files), GgufFile.read(tower[0]) if tower else None
        with _damage_named(file):
            config = hub_config(model, projector)
        read_config(config)
        with new_folder(folder, SMALL_BYTES, f"the tokenizer of {file.name}") as unfinished:
            with _damage_named(file):
                write_tokenizer(unfinished, model.entries)
            (unfinished / CONFIG).write_text(json.dumps(config, indent=2))
            if projector:
                for name, content in processor_files(projector).items():
                    (unfinished / name).write_text(json.dumps(content, indent=2))
                (unfinished / MMPROJ_LINK).symlink_to(tower[0])
            for number, part in enumerate(files, 1):
                (unfinished / (LINK if number == 1 else f"model.part{number:05}.gguf")).symlink_to(part)
    return folder


def _mark(files: list[Path]) -> str:
    """Identifies files by name, size and modification time."""
    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Any error of reading as CheckpointError: entries may have any type and value."""
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


def _on_hub(tensor: GgufTensor, inner: dict[str, str]) -> list[tuple[str, GgufTensor]]:
    """The tensors that a stored one is on the hub, by name: mostly itself, or one for each expert.

    inner: names of a layer's modules.
    """
    module, _, kind = tensor.name.rpartition(".")
    if module in OUTER:
        return [(f"{OUTER[module]}.{kind}", tensor)]
    layer, _, part = module.removeprefix("blk.").partition(".")
    if module.startswith("blk.") and part in inner:
        return [(f"{LAYERS}{layer}.{inner[part]}.{kind}", tensor)]
    if module.startswith("blk.") and part in STACKED and len(tensor.shape) == 3:
        experts = enumerate(tensor.stacked())
        return [(f"{LAYERS}{layer}{EXPERTS}{index}.{STACKED[part]}.{kind}", matrix) for index, matrix in experts]
    raise CheckpointError(f"the file has the tensor {tensor.name}, which no supported model has")
