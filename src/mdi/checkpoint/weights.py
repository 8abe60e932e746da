"""What stages and chunks are made of: the weights of a checkpoint, quantised where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mdi.checkpoint.source import Source
from mdi.core.errors import CheckpointError
from mdi.core.quantization import UNQUANTIZED, Quantization, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.layers.quantize import NotFiniteError, ScaleError, dequantize, quantize
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.parts import Parts


@dataclass
class Rounding:
    """How far rounded weights are from those before: sums of squares of the differences, and of the weights."""

    wrong: float = 0.0
    whole: float = 0.0

    def add(self, weight: Tensor, made: QuantizedTensor) -> None:
        """weight: [outputs, *inputs], from which `made` was rounded."""
        self.wrong += float((dequantize(made) - weight.flatten(1)).square().sum(dtype=torch.float64))
        self.whole += float(weight.square().sum(dtype=torch.float64))

    @property
    def relative_error(self) -> float:
        """0 where nothing was rounded."""
        return (self.wrong / self.whole) ** 0.5 if self.whole else 0.0


class Weights(Protocol):
    """Weights by the names that they have on the hub, read or made one at a time."""

    def tensor(self, name: str) -> Tensor:
        """One that is not quantised. Raises CheckpointError for one that is not there."""

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor:
        """A matrix in a format. Raises CheckpointError for numbers that no format has, UnfitError for its scales."""


class UnfitError(CheckpointError):
    """A matrix whose numbers the scales of a format cannot describe: it is kept as it is."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"the tensor {name} cannot be quantised: {cause}")
        self.name = name


@dataclass(frozen=True)
class RoundedWeights:
    """A checkpoint's weights, as they are stored where that is in a format, or rounded to the nearest that it has.

    rounding: of the weights so far that were stored quantised, but are rounded to another format.
    """

    source: Source
    rounding: Rounding = field(default_factory=Rounding)

    def tensor(self, name: str) -> Tensor:
        return self.source.tensor(source_name(self.source, name))

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor:
        if stored := self.source.quantized(source_name(self.source, name), quantization):
            return stored
        weight = self.tensor(name)
        try:
            made = quantize(weight, quantization)
        except NotFiniteError as error:
            raise not_finite(name, error) from None
        except ScaleError as error:
            raise UnfitError(name, str(error)) from None
        if self.source.quantization != UNQUANTIZED:
            self.rounding.add(weight, made)
        return made


@dataclass(frozen=True)
class RankWeights:
    """The parts of whole weights that one rank has."""

    whole: Weights
    parts: Parts

    def tensor(self, name: str) -> Tensor:
        return self.parts.cut(name, self.whole.tensor(name))

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor:
        return self.parts.cut(name, self.whole.quantized(name, quantization))


def not_finite(name: str, error: NotFiniteError) -> CheckpointError:
    """What is said of a matrix with numbers that no format has."""
    return CheckpointError(f"the tensor {name} cannot be quantised: {error}; download or convert the checkpoint again")


def source_name(source: Source, name: str) -> str:
    """Under which name a checkpoint has a weight: a tied head that is quantised is its embedding."""
    return EMBEDDING if name == LM_HEAD and source.model_config.tied_embeddings else name


def weight_of(weights: Weights, name: str, spec: TensorSpec) -> Tensor | QuantizedTensor:
    """One weight, in the format of its spec."""
    return weights.quantized(name, spec.quantization) if spec.quantization else weights.tensor(name)
