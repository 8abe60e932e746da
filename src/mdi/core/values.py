"""Values as JSON gives them, checked: numbers and texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mdi.core.errors import InputError

MAX_DEPTH = 32

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a surrogate pair, which no tokenizer takes


def as_whole(value: Any) -> Any:
    """4.0 as 4, since some languages know one kind of number; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def checked_text(text: str, place: str) -> str:
    """The text. Raises InputError, naming the place, for half of a surrogate pair."""
    if not text.isascii() and SURROGATE.search(text):  # nothing is scanned in a base64 image
        raise InputError(f"{place} holds half of a surrogate pair, which is no text", place)
    return text


def checked_json(value: Any, place: str, depth: int = MAX_DEPTH) -> Any:
    """A copy of a JSON value. Raises InputError, naming the place, for texts that are none and for deep nesting."""
    if depth < 0:
        raise InputError(f"{place} is nested more than {MAX_DEPTH} levels deep", place)
    if isinstance(value, str):
        return checked_text(value, place)
    if isinstance(value, Mapping):
        return {checked_text(name, place): checked_json(item, place, depth - 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [checked_json(item, place, depth - 1) for item in value]
    return value
