"""API keys: who may ask, how much, and until when. Given as options, or in a file that is reread when it changes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from mdi.core.errors import ConfigError, invalid

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
CHECK_EVERY_S = 1.0  # how often a request asks whether the file has changed
DAY_S = 86_400

log = logging.getLogger(__name__)

Limit = Annotated[int, Field(strict=True, ge=1)]


def _moment(value: Any) -> Any:
    """A date or a time as YAML and JSON have it: UTC unless it says otherwise, a date is its first moment."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise ValueError("Input must be a date like 2027-01-31 or a time like 2027-01-31T12:00:00Z")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


class Key(BaseModel):
    """One key of the file, under its name. Its secret is the key itself, or its SHA-256 in hexadecimal digits.

    requests_per_minute: refills evenly, and lets a minute's requests come at once. running_requests: at the same time.
    tokens_per_day: of prompts and answers, from midnight to midnight UTC; what runs when they are used up goes on.
    expires: the first moment when it is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    key: Annotated[str, Field(strict=True, min_length=1)] | None = None
    sha256: Annotated[str, Field(strict=True, pattern="^[0-9a-fA-F]{64}$")] | None = None
    requests_per_minute: Limit | None = None
    running_requests: Limit | None = None
    tokens_per_day: Limit | None = None
    expires: Annotated[datetime, BeforeValidator(_moment)] | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("a name of a key has up to 64 letters, digits and . _ @ -")
        return name

    @model_validator(mode="after")
    def _check_secret(self) -> Key:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("a key needs either key or sha256")
        return self

    @property
    def digest(self) -> bytes:
        return sha256((self.key or "").encode()).digest() if self.sha256 is None else bytes.fromhex(self.sha256)


@dataclass(frozen=True)
class Refusal:
    """Why a key's request does not run now, and when it may be sent again."""

    message: str
    retry_after_s: int


@dataclass
class Account:
    """What the requests of one key have used. now: seconds since 1970, in UTC."""

    running: int = 0
    _requests: float = 0.0  # of this minute; they wear off evenly
    _counted_at: float = 0.0
    _day: int = 0
    _tokens: int = 0

    def begin(self, key: Key, now: float) -> Refusal | None:
        """Counts a request that begins; None if the limits allow it. Call `end` for each that began."""
        if key.tokens_per_day is not None and self._tokens_on(now) >= key.tokens_per_day:
            left_s = DAY_S - now % DAY_S
            return Refusal(f"the key {key.name} has used its {key.tokens_per_day} tokens of today", int(left_s) + 1)
        if key.running_requests is not None and self.running >= key.running_requests:
            return Refusal(f"the key {key.name} may have {key.running_requests} requests running at once", 1)
        if key.requests_per_minute is not None:
            per_s = key.requests_per_minute / 60
            self._requests = max(0.0, self._requests - (now - self._counted_at) * per_s)
            self._counted_at = now
            if self._requests > key.requests_per_minute - 1:
                wait_s = (self._requests - key.requests_per_minute + 1) / per_s
                message = f"the key {key.name} may send {key.requests_per_minute} requests a minute"
                return Refusal(message, int(wait_s) + 1)
            self._requests += 1
        self.running += 1
        return None

    def end(self, tokens: int, now: float) -> None:
        """Counts the end of a request, and the tokens of its prompt and answers."""
        self.running -= 1
        self._tokens = self._tokens_on(now) + tokens

    def _tokens_on(self, now: float) -> int:
        day = int(now // DAY_S)
        if day != self._day:
            self._day, self._tokens = day, 0
        return self._tokens


class Keys:
    """The keys of a server: those given, under the names key-1, key-2, ..., and those of a file.

    A key is found by an HMAC of its hash under a secret of this process, so that the time of a search says nothing
    about other keys. clock: seconds since 1970. Raises ConfigError for a file that cannot be used, at the start only.
    """

    def __init__(self, given: Iterable[str], file: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._given = [Key(name=f"key-{number}", key=key) for number, key in enumerate(given, 1)]
        self._file = file
        self._secret = secrets.token_bytes(32)
        self._accounts: dict[str, Account] = {}
        self._checked_at = clock()
        self._lock = asyncio.Lock()
        self._stamp = _stamp(file)
        self._known = self._table(read_keys(file) if file else [])

    async def find(self, secret: bytes) -> Key | None:
        """The key with this secret, expired or not, in the file as it is now."""
        if self._file is not None and abs(self.clock() - self._checked_at) > CHECK_EVERY_S:
            async with self._lock:
                await self._refresh(self._file)
        return self._known.get(self._mac(sha256(secret).digest()))

    def account(self, key: Key) -> Account:
        return self._accounts.setdefault(key.name, Account())

    async def _refresh(self, file: Path) -> None:
        """Rereads the file if it has changed. A file that cannot be used changes nothing, and is logged once."""
        self._checked_at = self.clock()
        stamp = await asyncio.to_thread(_stamp, file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._known = self._table(await asyncio.to_thread(read_keys, file))
            log.warning("the API keys are those of %s as it is now: %d", file, len(self._known))
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)

    def _table(self, keys: Iterable[Key]) -> Mapping[bytes, Key]:
        return {self._mac(key.digest): key for key in (*keys, *self._given)}

    def _mac(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def has_expired(key: Key, now: float) -> bool:
    return key.expires is not None and key.expires <= datetime.fromtimestamp(now, UTC)


def read_keys(file: Path) -> list[Key]:
    """The keys of a YAML or JSON file: an object of names, see `Key`. Raises ConfigError, naming key and field."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the API keys in {file} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError):  # ValueError: bytes that are no UTF-8, a date that there is not
        raise ConfigError(f"{file} is not valid YAML: write `name: {{key: ...}}` for each API key") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file} has no API keys: write `name: {{key: ...}}` for each")
    keys, owners = list[Key](), dict[bytes, str]()
    for name, entry in content.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"{file}: {name} is not an object with key or sha256")
        try:
            key = Key.model_validate({**entry, "name": str(name)})
        except ValidationError as error:
            raise ConfigError(f"{file}: {name}: {_without_secrets(error)}") from None
        if (owner := owners.setdefault(key.digest, key.name)) != key.name:
            raise ConfigError(f"{file}: {owner} and {key.name} have the same key: give each its own")
        keys.append(key)
    return keys


def _without_secrets(error: ValidationError) -> str:
    """pydantic's first finding without the value, which may be a key."""
    return str(invalid([{**error.errors(include_url=False)[0], "input": None}]))


def _stamp(file: Path | None) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; None for a file that is not there."""
    try:
        status = os.stat(file) if file is not None else None  # noqa: PTH116
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev)
