"""Checkpoints that are quantised already, by GPTQ or AWQ: their integers, zeros and scales are taken as they are.

Layouts: AutoGPTQ 0.7 (`auto_gptq/nn_modules/qlinear/qlinear_cuda.py`), AutoAWQ 0.2 (`awq/modules/linear/gemm.py`). A
word is an int32 of eight numbers with 4 bits, or four with 8, the first one lowest.

  GPTQ  qweight [inputs / 8, outputs]: number j of a word is input 8 i + j. g_idx [inputs]: the group of each input
  AWQ   qweight [inputs, outputs / 8]: number j of a word is output 8 i + AWQ_ORDER[j]
  both  scales float16 [groups, outputs]; qzeros [groups, outputs / 8], in GPTQ's first format less by one

A weight is (number - zero) * scale. With act-order (`desc_act`) inputs are stored by their groups, and the product
gathers its activations: see `QuantizedTensor`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from mdi.checkpoint.safetensors import SafetensorsSource
from mdi.core.entries import Entries
from mdi.core.errors import CheckpointError
from mdi.core.quantization import (
    INT4,
    INT4_ORDERED,
    INT4_ZEROS,
    INT4_ZEROS_ORDERED,
    INT8,
    INT8_GROUPS,
    INT8_GROUPS_ORDERED,
    ModelQuantization,
    Quantization,
    QuantizedTensor,
)
from mdi.core.tensors import TensorSpec
from mdi.layers.quantize import pack4
from mdi.models.config import StageSpec, unusable
from mdi.models.decoder import LAYERS, LM_HEAD
from mdi.models.entries import CONFIG
from mdi.models.weights import stage_specs

log = logging.getLogger(__name__)

ENTRY = "quantization_config"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUPPORTED = "GPTQ with 4 or 8 bits, AWQ with 4 bits"


class GptqEntries(Entries):
    """`quantization_config` of AutoGPTQ and GPTQModel. dynamic: settings by name of module; `-:NAME` leaves it out."""

    bits: int
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: str | None = "gptq"
    dynamic: dict[str, Any] | None = None


class AwqEntries(Entries):
    """`quantization_config` of AutoAWQ, which has older names for two."""

    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(default=128, validation_alias=AliasChoices("group_size", "q_group_size"))
    zero_point: bool = True
    version: str = "gemm"


@dataclass(frozen=True)
class Packing:
    """How matrices are stored. group: inputs that share scale and zero; None is all.

    awq: in its layout, else in GPTQ's. ordered: inputs have groups in any order. symmetric: all zeros are the middle.
    zero_offset: of zeros to what is stored.
    """

    awq: bool
    bits: int
    group: int | None
    ordered: bool = False
    symmetric: bool = False
    zero_offset: int = 0

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Packing:
        """From a checkpoint's config.json. Raises CheckpointError for what is not supported."""
        content = config[ENTRY]
        method = content.get("quant_method") if isinstance(content, dict) else None
        if method == "gptq":
            return cls._gptq(GptqEntries.read(content, CONFIG, ENTRY))
        if method == "awq":
            return cls._awq(AwqEntries.read(content, CONFIG, ENTRY))
        raise unusable(f"weights quantised by {method!r} are not supported: use {SUPPORTED}, or what it was made from")

    @classmethod
    def _gptq(cls, entries: GptqEntries) -> Packing:
        kind = entries.checkpoint_format or "gptq"
        if kind not in ("gptq", "gptq_v2"):
            raise unusable(f"GPTQ in the format {kind!r} is not supported: convert it to 'gptq' or 'gptq_v2'")
        if any(not name.startswith("-:") for name in entries.dynamic or {}):
            raise unusable("GPTQ with settings of their own for some modules (dynamic) is not supported")
        _check(entries.bits, (4, 8), entries.group_size)
        group = None if entries.group_size == -1 else entries.group_size
        ordered = entries.desc_act and group is not None
        return cls(False, entries.bits, group, ordered, entries.sym, zero_offset=int(kind == "gptq"))

    @classmethod
    def _awq(cls, entries: AwqEntries) -> Packing:
        if entries.version.lower() != "gemm" or not entries.zero_point:
            raise unusable("AWQ is supported in its version 'gemm' with zero_point only: convert it to that")
        _check(entries.bits, (4,), entries.group_size)
        return cls(True, entries.bits, None if entries.group_size == -1 else entries.group_size)

    @property
    def format(self) -> Quantization:
        """What matrices are in memory. int8 has no zeros, and groups of 64 or none: other weights are rounded to it."""
        if self.bits == 4:
            plain, ordered = (INT4, INT4_ORDERED) if self.symmetric else (INT4_ZEROS, INT4_ZEROS_ORDERED)
            return ordered if self.ordered else plain
        if self.group is None or not self.is_exact:
            return INT8
        return INT8_GROUPS_ORDERED if self.ordered else INT8_GROUPS

    @property
    def is_exact(self) -> bool:
        """Whether matrices keep their numbers."""
        return self.bits == 4 or (self.symmetric and (self.group or 64) % 64 == 0)

    def unpacked(self, words: Tensor) -> Tensor:
        """The numbers of words that lie along outputs: int32 [rows, n] -> uint8 [rows, outputs]."""
        numbers = _unpacked(words.contiguous().view(torch.uint8), self.bits)
        if not self.awq:
            return numbers
        places = torch.tensor(AWQ_ORDER).argsort()
        return numbers.view(len(words), -1, 8)[..., places].flatten(1)


def _check(bits: int, supported: tuple[int, ...], group: int) -> None:
    if bits not in supported:
        raise unusable(f"{ENTRY}.bits is {bits}: supported are {SUPPORTED}")
    if group != -1 and (group <= 0 or group % 32):
        raise unusable(f"{ENTRY}.group_size is {group}: supported are multiples of 32, and -1")


class QuantizedSource(SafetensorsSource):
    """A `Source` of such a checkpoint: `X.weight` stands for the tensors `X.qweight`, `X.scales` and so on."""

    @cached_property
    def packing(self) -> Packing:
        """How its matrices are stored. Raises CheckpointError for what is not supported."""
        return Packing.read(self.config)

    @classmethod
    def open(cls, path: Path) -> Self:
        source = super().open(path)
        if not source.packing.is_exact:
            log.warning(
                "%s has 8 bits in groups or with zeros that int8 does not have: its weights are rounded once more, to "
                "one scale an output",
                path.name,
            )
        return source

    @cached_property
    def quantization(self) -> ModelQuantization:
        """Of the parts that have quantised matrices; their others are kept."""
        name = self.packing.format.name
        in_layers = any(matrix.startswith(LAYERS) for matrix in self._matrices)
        in_vision = any(not matrix.startswith(("model.", LM_HEAD)) for matrix in self._matrices)
        found_in = in_layers, LM_HEAD in self._matrices, in_vision
        layers, head, vision = (name if found else None for found in found_in)
        made, config = ModelQuantization(layers, head, vision), self.model_config
        specs = stage_specs(config, StageSpec.everything(config), config.dtype, made)
        matrices = (matrix for matrix, spec in specs.items() if spec.quantization)
        return replace(made, kept=tuple(matrix for matrix in matrices if matrix not in self._matrices))

    @property
    def is_exact(self) -> bool:
        return self.packing.is_exact

    def names(self) -> frozenset[str]:
        packed = {f"{_module(matrix)}.{part}" for matrix in self._matrices for part in PARTS}
        return super().names() - packed | self._matrices

    def spec(self, name: str) -> TensorSpec:
        """Of a quantised matrix the one that it has when it is dequantised. Raises CheckpointError for misfit parts."""
        if name not in self._matrices:
            return super().spec(name)
        module, packing = _module(name), self.packing
        per_word = 32 // packing.bits
        rows, columns = self._shape(module, "qweight", "I32")
        inputs, outputs = (rows, columns * per_word) if packing.awq else (rows * per_word, columns)
        groups = -(-inputs // (packing.group or inputs))
        expected: dict[str, tuple[int, ...]] = {"scales": (groups, outputs), "qzeros": (groups, outputs // per_word)}
        if packing.ordered or self._has_groups(module):
            expected["g_idx"] = (inputs,)
        for part, shape in expected.items():
            if (found := self._shape(module, part, "float16" if part == "scales" else "I32")) != shape:
                raise CheckpointError(
                    f"the tensor {module}.{part} has shape {list(found)}, but its qweight and {ENTRY} ask for "
                    f"{list(shape)}: config.json and weights disagree"
                )
        return TensorSpec((outputs, inputs), "float32")

    def tensor(self, name: str) -> Tensor:
        if name not in self._matrices:
            return super().tensor(name)
        module, (outputs, inputs) = _module(name), self.spec(name).shape
        groups = self._groups(module, inputs)
        zeros, scales = self._zeros(module), self._scales(module)
        made = self._numbers(module).view(outputs, inputs).float()
        return made.sub_(zeros.float()[:, groups]).mul_(scales.float()[:, groups])

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor | None:
        packing = self.packing
        if name not in self._matrices or quantization != packing.format or not packing.is_exact:
            return None
        module, (_, inputs) = _module(name), self.spec(name).shape
        groups = self._groups(module, inputs)
        order = groups.argsort(stable=True) if packing.ordered else None
        of_blocks = self._groups_of_blocks(module, groups if order is None else groups[order])
        zeros, scales = self._zeros(module), self._scales(module)[:, of_blocks]
        return QuantizedTensor(
            quantization,
            self._values(module, order),
            scales.float() if packing.bits == 8 else scales,
            zeros[:, of_blocks].contiguous() if quantization.zeros else None,
            None if order is None else order.int(),
        )

    @cached_property
    def _matrices(self) -> frozenset[str]:
        """The names of the weights that are quantised."""
        return frozenset(f"{_module(name)}.weight" for name in super().names() if name.endswith(".qweight"))

    def _is_ignored(self, name: str) -> bool:
        """Also biases of zeros, which early GPTQ gave to every module."""
        is_bias = name.endswith(".bias") and f"{_module(name)}.weight" in self._matrices
        return super()._is_ignored(name) or (is_bias and not self.tensor(name).any())

    def _shape(self, module: str, part: str, dtype: str) -> tuple[int, ...]:
        """Raises CheckpointError for a part that is missing, of another type or no matrix."""
        spec = super().spec(f"{module}.{part}")
        if spec.dtype != dtype or len(spec.shape) != (1 if part == "g_idx" else 2):
            raise CheckpointError(
                f"the tensor {module}.{part} is {spec.dtype} {list(spec.shape)}, which {ENTRY} does not describe: "
                "download or convert the checkpoint again"
            )
        return spec.shape

    def _has_groups(self, module: str) -> bool:
        return not self.packing.awq and f"{module}.g_idx" in super().names()

    def _groups(self, module: str, inputs: int) -> Tensor:
        """The group of each input: int64 [inputs]."""
        usual = torch.arange(inputs) // (self.packing.group or inputs)
        if not self._has_groups(module):
            return usual
        groups = super().tensor(f"{module}.g_idx").long()
        if not 0 <= int(groups.min()) <= int(groups.max()) <= int(usual[-1]):
            raise CheckpointError(
                f"{module}.g_idx names a group that is not one of {int(usual[-1]) + 1}: download the checkpoint again"
            )
        if not self.packing.ordered and not torch.equal(groups, usual):
            raise CheckpointError(f"{module}.g_idx orders inputs, but {ENTRY} says no desc_act: set it to true")
        return groups

    def _groups_of_blocks(self, module: str, groups: Tensor) -> Tensor:
        """The group of each block of inputs that has one scale in memory: int64 [blocks]."""
        blocks = groups.view(-1, self.packing.format.group or len(groups))
        if not (blocks == blocks[:, :1]).all():
            raise CheckpointError(
                f"{module}.g_idx has groups that are no multiple of {blocks.shape[1]} inputs: quantise the model again "
                "with the group size of its config.json"
            )
        return blocks[:, 0]

    def _zeros(self, module: str) -> Tensor:
        """uint8 [outputs, groups]"""
        packing = self.packing
        middle = 2 ** (packing.bits - 1)
        zeros = packing.unpacked(super().tensor(f"{module}.qzeros")).add(packing.zero_offset).t()  # up to 16, as there
        if packing.symmetric and not (zeros == middle).all():
            raise CheckpointError(
                f"{module}.qzeros has zeros that are not {middle}, but {ENTRY} says sym: set it to false"
            )
        return zeros

    def _scales(self, module: str) -> Tensor:
        """float16 [outputs, groups]"""
        scales = super().tensor(f"{module}.scales").t()
        if not scales.isfinite().all():
            raise CheckpointError(
                f"{module}.scales has numbers that are infinite or none: download or convert the checkpoint again"
            )
        return scales

    def _values(self, module: str, order: Tensor | None) -> Tensor:
        """As `QuantizedTensor` has them."""
        if self.packing.awq:
            return _in_pairs(super().tensor(f"{module}.qweight"))
        if self.packing.bits == 4 and order is None:  # only words are to be transposed
            return super().tensor(f"{module}.qweight").t().contiguous().view(torch.uint8)
        numbers = self._numbers(module)
        if order is not None:
            numbers = numbers[:, order]
        return pack4(numbers) if self.packing.bits == 4 else (numbers ^ 128).view(torch.int8)  # minus 128

    def _numbers(self, module: str) -> Tensor:
        """uint8 [outputs, inputs]"""
        words = super().tensor(f"{module}.qweight")
        if self.packing.awq:
            return self.packing.unpacked(words).t().contiguous()
        return _unpacked(words.t().contiguous().view(torch.uint8), self.packing.bits)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """A number in each byte, from one or two: uint8 [rows, bytes] -> uint8 [rows, numbers]."""
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def _in_pairs(words: Tensor) -> Tensor:
    """AWQ's words, two inputs of an output in a byte: int32 [inputs, outputs / 8] -> uint8 [outputs, inputs / 2]."""
    packed = words.contiguous().view(torch.uint8)
    even, odd = packed[::2], packed[1::2]
    pairs = torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 240)), dim=-1).flatten(1)
    places = torch.tensor(AWQ_ORDER).argsort()
    return pairs.t().contiguous().view(-1, 8, len(pairs))[:, places].flatten(0, 1)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
