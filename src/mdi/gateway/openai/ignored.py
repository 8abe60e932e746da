"""Unknown fields of OpenAI requests: ignored and listed in a response header, or refused by a strict server."""

from __future__ import annotations

from urllib.parse import quote

from mdi.core.errors import InputError
from mdi.core.unknown_fields import general_name, warn_once

HEADER = "x-mdi-ignored"
MAX_LISTED = 32  # a header has a limited length


class IgnoredFields:
    """The unknown fields of one request. Called with the path of each: see `UnknownField`."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._names: dict[str, None] = {}

    def __call__(self, path: str) -> None:
        """Raises InputError on a strict server."""
        if self._strict:
            raise InputError(f"unknown field {path}: leave it out, or serve without --strict-requests", path)
        warn_once(path)
        if len(self._names) <= MAX_LISTED:
            self._names[general_name(path)] = None

    @property
    def headers(self) -> dict[str, str]:
        """The header that lists their names, percent-encoded, "" for the empty one; none without such fields."""
        names = [quote(name, safe="[]._-", errors="replace") or '""' for name in self._names]
        if len(names) > MAX_LISTED:
            names[MAX_LISTED:] = ["..."]
        return {HEADER: ", ".join(names)} if names else {}
