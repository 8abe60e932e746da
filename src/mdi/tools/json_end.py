"""Where a JSON value ends, in a text that grows by pieces."""

from __future__ import annotations

import re

STOPS = re.compile(r'["\\{}\[\]]')
IN_STRING = re.compile(r'["\\]')


class JsonEnd:
    """Finds the end of one JSON object. It knows strings and brackets; whether the rest is JSON is not its matter."""

    def __init__(self) -> None:
        self.found = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> int:
        """Takes more text. Returns how much of it belongs to the object: all of it until the end is `found`."""
        place = 0
        while place < len(text):
            if self._escaped:
                self._escaped = False
                place += 1
                continue
            stop = (IN_STRING if self._in_string else STOPS).search(text, place)
            if stop is None:
                break
            place = stop.end()
            if self._take(stop[0]):
                self.found = True
                return place
        return len(text)

    def _take(self, character: str) -> bool:
        """Whether this character is the last one."""
        if self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False
