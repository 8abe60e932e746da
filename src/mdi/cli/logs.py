"""The log of `mdi serve` and `mdi secondary` on standard error: lines of text, or one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Annotated, Any, TextIO

import typer

ACCESS, LINES = logging.getLogger("mdi.access"), logging.getLogger("mdi.stderr")


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


LogFormatOption = Annotated[LogFormat, typer.Option(help="How the log is written: text, or json, an object a line.")]


def set_up_logs(log_format: LogFormat, *, access: bool = False) -> None:
    """Called once, before anything is logged. access: a line for each request.

    As JSON, all that this process writes to standard error is: warnings, errors that end it, and lines of libraries.
    """
    if log_format is LogFormat.JSON:
        _write_json(sys.stderr)
    if not access:
        return
    ACCESS.setLevel(logging.INFO)
    if log_format is LogFormat.TEXT:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        ACCESS.addHandler(handler)
        ACCESS.propagate = False


def logs_json() -> bool:
    """Whether standard error takes JSON only."""
    return isinstance(sys.stderr, LoggedLines)


def _write_json(stream: TextIO) -> None:
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter())
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    LINES.setLevel(logging.INFO)
    sys.stderr = LoggedLines(stream)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda failed: _log_uncaught(failed.exc_type, failed.exc_value, failed.exc_traceback)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # they redraw one line


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time (UTC), level, logger, message, and the values of a message that names them."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(record.args, Mapping):
            fields |= record.args
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class LoggedLines(io.TextIOBase):
    """Standard error of a process that logs JSON: each line that is written becomes a record."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.RLock()
        self._begun = ""

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                if line.strip():
                    LINES.info("%s", line.rstrip())
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drops what cannot be written: the default writes it to standard error, which leads here again."""


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error and not issubclass(kind, SystemExit):
        logging.getLogger("mdi").critical("%s", kind.__name__, exc_info=(kind, error, traceback))
