"""Tools that a model may call, and which of them it has to: as requests give them, checked. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ChoiceMode = Literal["auto", "required", "none"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the caller runs when the model asks for it.

    parameters: the JSON schema of its arguments. strict: they are held to all of it. Without it, too; it decides how
    a schema that is not supported whole is answered.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools an answer calls.

    mode: auto leaves it to the model, required wants at least one call, none forbids them. names: the only tools that
    may be called; empty for all. parallel: whether an answer may have several calls.
    """

    mode: ChoiceMode = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True
