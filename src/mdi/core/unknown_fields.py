"""Fields of requests that nothing here knows: refused by their path, or ignored with one warning for each name."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mdi.core.errors import InputError

MAX_NAMES = 100
MAX_NAME_CHARACTERS = 80

log = logging.getLogger(__name__)

UnknownField = Callable[[str], None]
"""Called with the path of each unknown field, such as messages[0].id."""


def report_unknown(given: Mapping[str, Any], known: Sequence[str], path: str, unknown: UnknownField) -> None:
    """Calls `unknown` with the path of each field of an object that is not known. path: of the object."""
    for name in given:
        if name not in known:
            unknown(f"{path}.{name}")


def refuse(path: str) -> None:
    """Raises InputError: fields must be known."""
    raise InputError(f"unknown field {path}", path)


def general_name(path: str) -> str:
    """A path without its indices, cut to a length that a log can bear: messages[3].id becomes messages[].id."""
    return re.sub(r"\[\d+\]", "[]", path)[:MAX_NAME_CHARACTERS]


class WarnOnce:
    """Ignores unknown fields. Each name is logged once, and of strangers' names no more than MAX_NAMES."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def __call__(self, path: str) -> None:
        name = general_name(path)
        if name in self._names or len(self._names) >= MAX_NAMES:
            return
        self._names.add(name)
        last = "; further names are not logged" if len(self._names) == MAX_NAMES else ""
        log.warning("requests have the unknown field %r: it is ignored%s", name, last)


warn_once = WarnOnce()
