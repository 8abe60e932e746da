"""Values of options in the forms that `vllm serve` takes: 4k, image=2,video=1, ["a", "b"]."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal

from mdi.core.errors import ConfigError

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "K": 2**10, "M": 2**20, "G": 2**30}
OUTER_COMMA = re.compile(r",(?![^(]*\))")
NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmgKMG]?)")


def tokens(given: str | int) -> int:
    """A number of tokens: 4096, 4k (4,000), 4K (4,096), 25.6k. Raises ConfigError for anything else."""
    if found := NUMBER.fullmatch(str(given).strip()):
        number = Decimal(found[1]) * UNITS[found[2]]
        if number == int(number):
            return int(number)
    raise ConfigError(f"a number of tokens is like 4096, 4k (4,000) or 4K (4,096), not {given!r}")


def limits_of_kinds(text: str | None, option: str) -> dict[str, int]:
    """Limits by kind of media: `image=2,video=1`, or a JSON object. Raises ConfigError for anything else."""
    if text is None:
        return {}
    try:
        given = json.loads(text) if text.lstrip().startswith("{") else dict(pair.split("=") for pair in text.split(","))
        limits = {kind.strip(): int(most) for kind, most in given.items()}
    except (ValueError, TypeError, OverflowError):
        limits = {}
    if not limits or not limits.keys() <= {"image", "video"}:
        raise ConfigError(f"{option} is like image=2,video=1, with no other kinds; got {text!r}")
    return limits


def amounts(text: str | None, option: str) -> dict[str, float] | None:
    """Numbers by name: `CPU=8,memory=16e9`, or a JSON object. Raises ConfigError for anything else."""
    given = pairs(text, option)
    if given is None:
        return None
    try:
        return {name: float(amount) for name, amount in given.items()}
    except ValueError:
        raise ConfigError(f"{option} is like CPU=8,memory=16e9, with numbers; got {text!r}") from None


def pairs(text: str | None, option: str) -> dict[str, str] | None:
    """Values by name: `zone=a,disk=!ssd`, or a JSON object. Commas in brackets belong to a value: `zone=in(a,b)`.

    Raises ConfigError for anything else.
    """
    if text is None:
        return None
    try:
        if text.lstrip().startswith("{"):
            given = {name: str(value) for name, value in json.loads(text).items()}
        else:
            given = dict(pair.split("=", 1) for pair in OUTER_COMMA.split(text))
    except ValueError:
        given = {}
    found = {name.strip(): value.strip() for name, value in given.items()}
    if not all(found) or not all(found.values()) or not found:
        raise ConfigError(f"{option} is like name=value,name=value; got {text!r}")
    return found


def words(given: Sequence[str] | None, option: str) -> tuple[str, ...]:
    """The words of a repeated option, each given alone or in a JSON list. Raises ConfigError for a broken list."""
    found = list[str]()
    for text in given or ():
        if not text.startswith("["):
            found.append(text)
            continue
        try:
            listed = json.loads(text)
        except ValueError:
            listed = [None]
        if not all(isinstance(word, str) for word in listed):
            raise ConfigError(f'{option} takes words, or a list of them like ["a", "b"]; got {text!r}')
        found += listed
    return tuple(found)


def dtype(text: str) -> str | None:
    """A dtype by torch's name or vLLM's; `auto` is the checkpoint's own."""
    return {"auto": None, "half": "float16", "float": "float32"}.get(text, text)


def unless_auto(text: str) -> str | None:
    return None if text == "auto" else text
