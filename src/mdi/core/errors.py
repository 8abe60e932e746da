"""The error tree: every failure a user can cause or meet. Knows nothing about HTTP statuses or exit codes.

    MDIError
    ├── InputError              the request is wrong; `field` names the part of it
    │   ├── MediaError          an image or video cannot be fetched, decoded or used
    │   ├── PromptTooLongError  prompt and answer do not fit the sequence length
    │   └── ModelNotFoundError  the request names a model that is not served here
    ├── ConfigError             options contradict each other or this machine
    ├── CheckpointError         a checkpoint, manifest or chunk cannot be used
    ├── NumbersError            the numbers of a request left the range of the dtype
    ├── LinkError               a node cannot be reached, refuses, or died; `node` names it
    ├── OverloadedError         the queue is full; try again later
    └── ClosedError             the engine is shutting down

Messages name the cause and the remedy. `gateway.errors` turns them into HTTP statuses, `cli` into exit codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_SHOWN_BITS = 128  # of a refused number; Python refuses to print very long ones
MAX_SHOWN_CHARACTERS = 40


class MDIError(Exception):
    """Root of the tree; catch it to catch everything this project raises on purpose."""


class InputError(MDIError):
    """The request is wrong. `field` is the request's name for the offending part, where there is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class MediaError(InputError):
    """An image or video cannot be fetched, decoded or used."""

    def __init__(self, message: str, field: str | None = "image") -> None:
        super().__init__(message, field)


class PromptTooLongError(InputError):
    """Prompt and answer do not fit the sequence length; prompts are refused, never cut."""


class ModelNotFoundError(InputError):
    """The request names a model that is not served here."""


class ConfigError(MDIError):
    """Options contradict each other or this machine."""


class CheckpointError(MDIError):
    """A checkpoint, manifest or chunk cannot be used."""


class NumbersError(MDIError):
    """The numbers of a request left the range of the dtype that it was computed in."""

    def __init__(self, dtype: str) -> None:
        remedy = "serve it with --dtype bfloat16 or --dtype float32"
        if dtype != "float16":
            remedy = "its weights may be damaged: compare them with the original"
        super().__init__(f"the numbers of this request overflowed in {dtype}, so the model has no answer; {remedy}")


class LinkError(MDIError):
    """A node cannot be reached, refuses, or died. `node` is its name, where it is known."""

    def __init__(self, message: str, node: str = "") -> None:
        super().__init__(message)
        self.node = node


class OverloadedError(MDIError):
    """The queue is full; try again later."""


class ClosedError(MDIError):
    """The engine is shutting down."""


def invalid(findings: Sequence[Mapping[str, Any]]) -> InputError:
    """pydantic's first finding, as a sentence that names the field in the form `messages[0].role`."""
    first = findings[0]
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"] if step != "[key]"]
    field = "".join(steps).removeprefix(".")
    if first["type"] == "extra_forbidden":
        return InputError(f"unknown field {field}", field)
    if first["type"] == "missing":
        return InputError(f"{field} is missing", field)
    message, value = first["msg"].removeprefix("Value error, "), first["input"]
    if _is_short(value):
        message += f", got {value!r}"
    if message.startswith("Input "):
        return InputError(message.replace("Input", field, 1), field)
    return InputError(f"{field}: {message}" if field else message, field or None)


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_SHOWN_CHARACTERS
    return isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() <= MAX_SHOWN_BITS)
