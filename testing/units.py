"""Unit files of systemd as systemd reads them: keys, words and environment (systemd.syntax(7))."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|(.))")
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s"]+')


@dataclass(frozen=True)
class UnitFile:
    """The lines of a unit's file, without its sections. values: by key, in order."""

    values: dict[str, list[str]]

    def one(self, key: str) -> str:
        """A value that is given once at most; empty if not."""
        [value] = self.values.get(key, [""])
        return value

    @property
    def command(self) -> list[str]:
        """The words of ExecStart."""
        return [word.replace("$$", "$") for word in _words(self.one("ExecStart"))]

    @property
    def environment(self) -> dict[str, str]:
        pairs = [word.split("=", 1) for line in self.values.get("Environment", []) for word in _words(line)]
        return {pair[0]: pair[1] for pair in pairs}


def read_unit(file: Path) -> UnitFile:
    values: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        if line and not line.startswith(("[", "#", ";")):
            key, _, value = line.partition("=")
            values.setdefault(key, []).append(value)
    return UnitFile(values)


def _words(line: str) -> list[str]:
    return [_unquoted(found[0]) for found in WORD.finditer(line)]


def _unquoted(word: str) -> str:
    if word.startswith('"'):
        word = ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[2], word[1:-1])
    return word.replace("%%", "%")
