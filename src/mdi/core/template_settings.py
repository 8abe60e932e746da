"""Settings that a chat template reads beside the messages, such as `enable_thinking`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mdi.core.errors import InputError

TemplateSettings = Mapping[str, bool | int | float | str | None]

FIELD = "chat_template_kwargs"  # as other servers call them
MAX_SETTINGS = 16
NAME = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
WORD = re.compile(r"[\w .:+-]{0,64}", re.ASCII)  # can hold no control token

RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Names that mean something else where templates are rendered."""


def check_settings(given: Any) -> None:
    """Raises InputError, naming one, unless all are numbers, booleans or words under names of their own.

    They come from strangers and templates write them between control tokens, so longer texts belong into messages.
    """
    if not isinstance(given, Mapping) or len(given) > MAX_SETTINGS:
        raise InputError(f"{FIELD} must be an object of at most {MAX_SETTINGS} settings", FIELD)
    for name, value in given.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED or name.endswith("_token"):
            raise InputError(f"{FIELD} has no setting {str(name)[:64]!r}: leave it out", FIELD)
        place = f"{FIELD}.{name}"
        if isinstance(value, str) and not WORD.fullmatch(value):
            raise InputError(f"{place} must be a word of at most 64 letters: put longer texts into messages", place)
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise InputError(f"{place} must be a boolean, a number or a word", place)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{place} must be a finite number", place)
