"""Settings of a request's images and videos as Qwen-VL's processors take them: vLLM's `mm_processor_kwargs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from mdi.core.errors import InputError
from mdi.core.messages import MAX_SETTING, Message, Part, VideoPart
from mdi.core.sampling import Number
from mdi.core.unknown_fields import UnknownField
from mdi.gateway.schemas import PixelCount

FIELD = "mm_processor_kwargs"


class Pixels(TypedDict):
    """Limits on the area of images and frames, as `TextEngine.submit` takes them."""

    min_pixels: int | None
    max_pixels: int | None


class Size(BaseModel):
    """transformers' names of the limits: of an area, not of edges."""

    model_config = ConfigDict(extra="allow")

    shortest_edge: PixelCount | None = None
    longest_edge: PixelCount | None = None


class MediaSettings(BaseModel):
    """min_pixels, max_pixels: area of images and frames whose part sets none. size: the same, in transformers' form.

    fps: frames a second of videos whose part sets neither fps nor nframes.
    """

    model_config = ConfigDict(extra="allow")

    min_pixels: PixelCount | None = None
    max_pixels: PixelCount | None = None
    size: Size | None = None
    fps: Annotated[Number, Field(gt=0, le=MAX_SETTING)] | None = None

    def check_fields(self, unknown: UnknownField) -> None:
        """Calls `unknown` with each unknown field."""
        for name in self.model_extra or ():
            unknown(f"{FIELD}.{name}")
        for name in (self.size and self.size.model_extra) or ():
            unknown(f"{FIELD}.size.{name}")

    def pixels(self, min_pixels: int | None, max_pixels: int | None) -> Pixels:
        """The request's limits on areas. Raises InputError where it sets two different ones."""
        size = self.size or Size()
        low = {"min_pixels": min_pixels, f"{FIELD}.min_pixels": self.min_pixels}
        high = {"max_pixels": max_pixels, f"{FIELD}.max_pixels": self.max_pixels}
        return {
            "min_pixels": _one(low | {f"{FIELD}.size.shortest_edge": size.shortest_edge}),
            "max_pixels": _one(high | {f"{FIELD}.size.longest_edge": size.longest_edge}),
        }

    def applied_to(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages, their videos with these frames a second."""
        return tuple(map(self._applied_to, messages)) if self.fps else tuple(messages)

    def _applied_to(self, message: Message) -> Message:
        if isinstance(message.content, str):
            return message
        return replace(message, content=tuple(map(self._sampled, message.content)))

    def _sampled(self, part: Part) -> Part:
        if isinstance(part, VideoPart) and part.fps is None and part.nframes is None:
            return replace(part, fps=self.fps)
        return part


def _one(given: dict[str, int | None]) -> int | None:
    """The value of settings that mean the same."""
    values = {name: value for name, value in given.items() if value is not None}
    if len(set(values.values())) > 1:
        shown = " and ".join(f"{name} is {value}" for name, value in values.items())
        raise InputError(f"{shown}: send one of them", list(values)[-1])
    return next(iter(values.values()), None)
