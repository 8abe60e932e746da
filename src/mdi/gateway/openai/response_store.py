"""Finished responses, kept in memory for `previous_response_id` and for their routes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mdi.core.config import MEBIBYTE

MAX_RESPONSES = 1000
MAX_BYTES = 256 * MEBIBYTE
VALUE_BYTES = 64  # of Python's objects, about


@dataclass(frozen=True)
class StoredResponse:
    """A response: its JSON, and the items of the whole conversation, in which earlier is what came before its input.

    size: in bytes, about.
    """

    content: Mapping[str, Any]
    earlier: tuple[Any, ...]
    input: tuple[Any, ...]
    size: int

    @property
    def items(self) -> tuple[Any, ...]:
        """The conversation, its output included."""
        return (*self.earlier, *self.input, *self.content["output"])


class ResponseStore:
    """The newest responses, up to a number and a size. No caller finds those of another."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._size = 0

    def add(self, caller: str, content: Mapping[str, Any], earlier: tuple[Any, ...], given: tuple[Any, ...]) -> None:
        """Keeps a response, and drops the oldest ones where there are too many. A conversation counts with each."""
        stored = StoredResponse(content, earlier, given, _size(content) + _size(earlier) + _size(given))
        self._stored[caller, content["id"]] = stored
        self._size += stored.size
        while len(self._stored) > self._max_responses or self._size > self._max_bytes:
            _, dropped = self._stored.popitem(last=False)
            self._size -= dropped.size

    def get(self, caller: str, name: str) -> StoredResponse | None:
        return self._stored.get((caller, name))

    def remove(self, caller: str, name: str) -> bool:
        """Whether there was one."""
        stored = self._stored.pop((caller, name), None)
        self._size -= stored.size if stored else 0
        return stored is not None


def _size(value: Any) -> int:
    """Bytes of a JSON value, about."""
    if isinstance(value, str):
        return VALUE_BYTES + len(value)
    if isinstance(value, Mapping):
        return VALUE_BYTES + sum(_size(name) + _size(item) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return VALUE_BYTES + sum(map(_size, value))
    return VALUE_BYTES
