"""How weights are quantised: the formats, a quantised weight, and which parts of a model have which format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mdi.core.errors import ConfigError

if TYPE_CHECKING:  # names of formats need no torch, which takes seconds to import
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Quantization:
    """One format of quantised weights.

    bits: of a weight. group: inputs of one output that share a scale; None is all of them.
    activation_group: inputs that share a scale when activations are quantised to int8, row by row.
    zeros: groups have zeros of their own. ordered: inputs are stored in another order than they come in. minimums:
    groups have minimums, which are added to their scaled values.
    """

    name: str
    bits: int
    group: int | None
    activation_group: int
    zeros: bool = False
    ordered: bool = False
    minimums: bool = False

    @property
    def rounding(self) -> Quantization:
        """The format of as many bits that weights are rounded to."""
        return INT8 if self.bits == 8 else INT4


INT8 = Quantization("int8", 8, None, 64)
INT8_32 = Quantization("int8-32", 8, 32, 32)
INT4 = Quantization("int4", 4, 32, 32)
NONE = "none"
"""What options and messages call no quantisation."""

QUANTIZATIONS = {format_.name: format_ for format_ in (INT8, INT8_32, INT4)}
"""The formats that weights are rounded to."""

INT8_GROUPS = Quantization("int8-groups", 8, 64, 64)
INT8_GROUPS_ORDERED = Quantization("int8-groups-ordered", 8, 64, 64, ordered=True)
INT4_ZEROS = Quantization("int4-zeros", 4, 32, 32, zeros=True)
INT4_ORDERED = Quantization("int4-ordered", 4, 32, 32, ordered=True)
INT4_ZEROS_ORDERED = Quantization("int4-zeros-ordered", 4, 32, 32, zeros=True, ordered=True)
INT8_32_MINIMUMS = Quantization("int8-32-minimums", 8, 32, 32, minimums=True)
INT4_MINIMUMS = Quantization("int4-minimums", 4, 32, 32, minimums=True)
_FOUND = (
    *(INT8_GROUPS, INT8_GROUPS_ORDERED, INT8_32_MINIMUMS),
    *(INT4_ZEROS, INT4_ORDERED, INT4_ZEROS_ORDERED, INT4_MINIMUMS),
)

FORMATS = QUANTIZATIONS | {format_.name: format_ for format_ in _FOUND}
"""Those, and the ones that quantised checkpoints have."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A quantised matrix [outputs, inputs]: weight = (value - zero) * scale, or value * scale + minimum.

    values: int8 [outputs, inputs]; for 4 bits uint8 [outputs, inputs / 2], input 2i in the low half of byte i.
    scales: [outputs, groups], float32 for 8 bits, float16 for 4.
    zeros: uint8 [outputs, groups] for 4 bits, up to 16; None is 8 everywhere for 4 bits without minimums, else 0.
    order: int32 [inputs]: which input of the product each stored one is; None where they are as they come.
    minimums: like scales; None is 0 everywhere. Such a matrix has no zeros.
    """

    quantization: Quantization
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None
    minimums: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, columns = self.values.shape
        return outputs, columns * (8 // self.quantization.bits)

    @property
    def parts(self) -> list[Tensor]:
        """What a file holds, in order."""
        parts = (self.values, self.scales, self.zeros, self.order, self.minimums)
        return [part for part in parts if part is not None]

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same on a device."""
        others = (None if part is None else part.to(device) for part in (self.zeros, self.order, self.minimums))
        return QuantizedTensor(self.quantization, self.values.to(device), self.scales.to(device), *others)


class UnknownFormatError(ConfigError):
    """A name that is no format's."""


@dataclass(frozen=True, slots=True)
class ModelQuantization:
    """The names of the formats of a model's parts: decoder layers, LM head, vision tower. None: not quantised.

    kept: names of matrices that are not quantised, whatever their part: no scales describe them.
    Raises UnknownFormatError.
    """

    layers: str | None = None
    head: str | None = None
    vision: str | None = None
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.parts:
            if name is not None and name not in FORMATS:
                raise UnknownFormatError(f"the quantisation {name!r} is unknown: use one of {', '.join(QUANTIZATIONS)}")

    @classmethod
    def asked(
        cls, quantization: str | None, head: str | None, vision: str | None, stored: ModelQuantization
    ) -> ModelQuantization | None:
        """What three options ask for: layers and head, the head alone, the vision tower alone. None: nothing is asked.

        `none` asks for a part that is not quantised, and for layers and head leaves the tower so, too. stored: the
        checkpoint's formats, of parts that are not named. A part whose format nothing is rounded to keeps it where one
        of as many bits is asked for.
        """
        if quantization is head is vision is None:
            return None
        if quantization == NONE:
            stored = cls()
        asked = quantization, head or quantization, vision
        layers, head, vision = (_chosen(*pair) for pair in zip(asked, stored.parts, strict=True))
        return cls(layers, head, vision, stored.kept)

    @property
    def parts(self) -> tuple[str | None, str | None, str | None]:
        """The formats of decoder layers, LM head and vision tower."""
        return self.layers, self.head, self.vision

    @property
    def calibrated(self) -> bool:
        """Whether how weights of the decoder are rounded may depend on a calibration text."""
        return any(name and FORMATS[name].bits == 4 for name in (self.layers, self.head))

    def __str__(self) -> str:
        """Like `int4 (head int8, vision int8)`: the layers' format, and those of other parts where they differ."""
        head = [f"head {self.head or NONE}"] if self.head != self.layers else []
        vision = [f"vision {self.vision}"] if self.vision else []
        others = ", ".join(head + vision)
        return (self.layers or NONE) + (f" ({others})" if others else "")


def _chosen(asked: str | None, stored: str | None) -> str | None:
    if asked is None:
        return stored
    if asked == NONE:
        return None
    if stored is None or stored in QUANTIZATIONS or asked not in QUANTIZATIONS:
        return asked
    return stored if FORMATS[stored].bits == FORMATS[asked].bits else asked


UNQUANTIZED = ModelQuantization()


def described(dtype: str, quantization: ModelQuantization) -> str:
    """A model's numeric types: its dtype, and the format of its weights where they are quantised."""
    return dtype if str(quantization) == NONE else f"{dtype}, {quantization}"
