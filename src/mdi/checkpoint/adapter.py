"""LoRA adapters: a folder as PEFT saves it, merged into the weights of a checkpoint as they are read.

W' = W + scale * B A with scale = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2106.09685, arXiv:2312.03732; PEFT,
src/peft/tuners/lora/layer.py). It is added in float32 and rounded to the type that W is stored in: the merged model is
the one that PEFT's `merge_and_unload` saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import regex
import torch
from pydantic import Field
from torch import Tensor

from mdi.checkpoint.json_file import read_json
from mdi.checkpoint.safetensors import opened
from mdi.checkpoint.tensor_file import TensorFile
from mdi.core.entries import Entries
from mdi.core.errors import CheckpointError
from mdi.core.quantization import UNQUANTIZED, ModelQuantization, Quantization, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.registry import family_of

if TYPE_CHECKING:
    from mdi.checkpoint.source import Source

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
MATCH_S = 5.0  # for one pattern and one name: usual ones take microseconds
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
REMEDY = "merge it into its base with PEFT (merge_and_unload), and serve what that saves"
ANOTHER_METHOD = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Entries of adapter_config.json that ask for more than W + scale * B A."""

OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base's weights


class AdapterEntries(Entries):
    """What is used of adapter_config.json. Patterns: by the end of a module's name, in place of the common value."""

    peft_type: str
    base_model_name_or_path: str | None = None
    r: Annotated[int, Field(ge=1)]
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: Any = True

    def rank(self, module: str) -> int:
        """The rank of one module's matrices."""
        return int(_of_pattern(self.rank_pattern or {}, module, self.r))

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank(module)
        alpha = _of_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _of_pattern(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """As PEFT's `get_pattern_key`: keys are regular expressions for the end of a name."""
    for key, value in pattern.items():
        try:
            if regex.match(rf"(.*\.)?({key})$", module, timeout=MATCH_S):
                return value
        except regex.error:
            raise CheckpointError(f"{CONFIG}: the pattern {key!r} is no regular expression: mend it") from None
        except TimeoutError:
            raise CheckpointError(
                f"{CONFIG}: the pattern {key!r} takes too long to match: write a simpler one"
            ) from None
    return otherwise


@dataclass(frozen=True)
class Adapter:
    """A folder with a LoRA adapter."""

    folder: Path
    entries: AdapterEntries
    weights: TensorFile

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Raises CheckpointError for a folder that is none, and for other methods than LoRA."""
        if not folder.is_dir():
            raise CheckpointError(f"there is no adapter folder {str(folder)!r}")
        content = read_json(folder / CONFIG)
        if (kind := content.get("peft_type")) != "LORA":
            raise CheckpointError(f"{CONFIG}: adapters of the type {kind!r} are not supported: only LORA is")
        for entry in ANOTHER_METHOD:
            if content.get(entry):
                raise CheckpointError(f"{CONFIG}: {entry} is set, which is not supported: {REMEDY}")
        entries = AdapterEntries.read(content, CONFIG)
        if str(entries.init_lora_weights).startswith(OTHER_BASES):
            raise CheckpointError(
                f"{CONFIG}: init_lora_weights is {entries.init_lora_weights!r}, which changes the base: {REMEDY}"
            )
        if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
            raise CheckpointError(
                f"{folder.name} has an {PICKLE}, which may run code: save the adapter with safe_serialization=True"
            )
        return cls(folder, entries, opened(folder / WEIGHTS))


@dataclass(frozen=True)
class AdaptedSource:
    """A `Source` of a checkpoint with an adapter. Chunks of it lie in the adapter's folder.

    modules: of the weights that the adapter changes, by name on the hub: their names in the adapter.
    """

    base: Source
    adapter: Adapter
    modules: Mapping[str, str]

    @classmethod
    def of(cls, base: Source, adapter: Adapter) -> AdaptedSource:
        """Raises CheckpointError where the two do not fit."""
        if base.quantization != UNQUANTIZED:
            raise CheckpointError(
                f"{base.path.name} is quantised already, and an adapter's changes are smaller than its steps: use the "
                "checkpoint that it was made from, with --adapter and --quantization"
            )
        family, modules = family_of(base.model_config.architecture), {}
        for name in adapter.weights.specs:
            if name.startswith(PREFIX) and name.endswith((DOWN, UP)):
                module = name.removeprefix(PREFIX).removesuffix(DOWN).removesuffix(UP)
                modules[family.hub_name(f"{module}.weight")] = module
            else:
                raise CheckpointError(f"{WEIGHTS} has {name}, which is not of a LoRA of linear layers: {REMEDY}")
        if not modules:
            raise CheckpointError(f"{WEIGHTS} changes nothing: save the adapter again")
        made = cls(base, adapter, modules)
        for weight in modules:
            made._check(weight)
        return made

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def home(self) -> Path:
        return self.adapter.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.base.config

    @cached_property
    def model_config(self) -> ModelConfig:
        return self.base.model_config

    @property
    def quantization(self) -> ModelQuantization:
        return self.base.quantization

    @property
    def is_exact(self) -> bool:
        return self.base.is_exact

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.base.files, self.adapter.folder / CONFIG, self.adapter.folder / WEIGHTS)

    def names(self) -> frozenset[str]:
        return self.base.names()

    def spec(self, name: str) -> TensorSpec:
        return self.base.spec(name)

    def tensor(self, name: str) -> Tensor:
        weight = self.base.tensor(name)
        if name not in self.modules:
            return weight
        module = self.modules[name]
        down, up = (self.adapter.weights.tensor(f"{PREFIX}{module}{half}").float() for half in (DOWN, UP))
        return torch.addmm(weight.float(), up, down, alpha=self.adapter.entries.scale(module)).to(weight.dtype)

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor | None:  # noqa: ARG002
        return None

    def _check(self, weight: str) -> None:
        """Whether the two matrices of a weight are there, and fit it."""
        module, base = self.modules[weight], self.adapter.entries.base_model_name_or_path
        of_base = f"it is an adapter of {base}, or of another model than this" if base else "it is of another model"
        if weight == EMBEDDING or (weight == LM_HEAD and self.model_config.tied_embeddings):
            raise CheckpointError(f"{WEIGHTS} changes {module}, which embedding and LM head share: {REMEDY}")
        if weight not in self.base.names():
            raise CheckpointError(f"{WEIGHTS} changes {module}, which {self.path.name} does not have: {of_base}")
        specs = [self.adapter.weights.specs.get(f"{PREFIX}{module}{half}") for half in (DOWN, UP)]
        found = [spec.shape for spec in specs if spec]
        if len(found) < len(specs):
            raise CheckpointError(f"{WEIGHTS} has only one matrix for {module}: save the adapter again")
        rank, shape = self.adapter.entries.rank(module), self.base.spec(weight).shape
        if len(shape) == 2 and found != [(rank, shape[1]), (shape[0], rank)]:
            raise CheckpointError(
                f"{WEIGHTS} has matrices of {found[0]} and {found[1]} for {module}, whose weight is {shape} here and "
                f"whose rank is {rank}: {of_base}"
            )
        if len(shape) != 2:
            raise CheckpointError(f"{WEIGHTS} changes {module}, which is no linear layer: {REMEDY}")
