"""Which family's way of calling tools, and of thinking, a checkpoint was trained on."""

from __future__ import annotations

from collections.abc import Container

MARKS = {"mistral": "[TOOL_CALLS]", "hermes": "<tool_call>", "llama3_json": '"parameters": '}
"""What the chat template of a family writes where a message has calls."""

GENERIC = "generic"
SYNTAXES = (*MARKS, GENERIC)
"""Names as in vLLM's --tool-call-parser; generic for models whose template knows no tools."""

THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def syntax_of(template: str) -> str:
    """The name of the syntax that a chat template writes calls in."""
    return next((name for name, mark in MARKS.items() if mark in template), GENERIC)


def reasoning_marks(template: str, vocabulary: Container[str]) -> tuple[str, str] | None:
    """The marks around thoughts: those that the template knows, or that are tokens of the vocabulary."""
    for start, end in THOUGHTS:
        if end in template or (start in vocabulary and end in vocabulary):
            return start, end
    return None
