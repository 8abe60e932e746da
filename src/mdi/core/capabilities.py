"""What a served model can do, for the routes that depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a served model can do.

    max_model_len: most tokens of prompt and answer together. modalities: what messages may hold: text, image, video.
    tool_syntax: how it writes calls of tools, as in `mdi.tools.SYNTAXES`. reasoning: the marks around its thoughts;
    None for a model that answers at once. special_marks: the marks of calls and thoughts that are special tokens, with
    their ids.
    """

    max_model_len: int
    modalities: tuple[str, ...] = ("text",)
    tool_syntax: str = "generic"
    reasoning: tuple[str, str] | None = None
    special_marks: Mapping[str, int] = field(default_factory=dict)
