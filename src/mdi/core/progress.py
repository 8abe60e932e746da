"""How long work shows how far it has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is done, done, total); both counts are bytes unless the caller says otherwise."""
