"""Which family's way of calling tools, and of thinking, a checkpoint was trained on."""

from __future__ import annotations

from collections.abc import Container

from mdi.core.errors import ConfigError

CALLS = {"mistral_args": "[ARGS]", "mistral": "[TOOL_CALLS]", "hermes": "<tool_call>", "llama3_json": '"parameters": '}
"""What the chat template of a family writes where a message has calls; the first that is found names it."""

GENERIC = "generic"
NAMES = (*CALLS, GENERIC)
"""Names as in vLLM's --tool-call-parser; generic for models whose template knows no tools."""

THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
ALL_MARKS = ("<tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", *(mark for marks in THOUGHTS for mark in marks))
"""Everything that begins a call or thoughts, or ends them, and may be a special token."""

REASONING = {"deepseek_r1": THOUGHTS[0], "qwen3": THOUGHTS[0], "mistral": THOUGHTS[1], "none": None}
"""Marks around thoughts under the names of vLLM's --reasoning-parser."""


def chosen_syntax(setting: str, found: str) -> str:
    """The syntax that a setting names; `found` for auto, and where mistral is its family.

    Raises ConfigError for an unknown one.
    """
    if setting not in ("auto", *NAMES):
        raise ConfigError(f"tool_call_parser must be auto or one of {', '.join(NAMES)}, got {setting!r}")
    return found if setting == "auto" or found.startswith(setting) else setting


def chosen_reasoning(setting: str, found: tuple[str, str] | None) -> tuple[str, str] | None:
    """The marks around thoughts that a setting names; `found` for auto. Raises ConfigError for an unknown one."""
    if setting not in ("auto", *REASONING):
        raise ConfigError(f"reasoning_parser must be auto or one of {', '.join(REASONING)}, got {setting!r}")
    return found if setting == "auto" else REASONING[setting]


def syntax_of(template: str) -> str:
    """The name of the syntax that a chat template writes calls in."""
    return next((name for name, mark in CALLS.items() if mark in template), GENERIC)


def reasoning_marks(template: str, vocabulary: Container[str]) -> tuple[str, str] | None:
    """The marks around thoughts: those that the template knows, or that are tokens of the vocabulary."""
    for start, end in THOUGHTS:
        if end in template or (start in vocabulary and end in vocabulary):
            return start, end
    return None
