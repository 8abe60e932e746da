"""How a family writes calls of tools. All of its texts are exact: grammars force them, and parsers look for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Syntax:
    """A family's way of writing calls: begin, call, separator, call, ..., end, with text around it.

    A call is: before, name, middle, arguments, after. Arguments are a JSON object.

    begins: the texts that may begin it; "" for calls that need none and are recognised by their heads, at the start
    of an answer only. marks: what decides that calls begin; the first part of each of `begins`. parallel: whether an
    answer may have several calls.
    """

    begins: tuple[str, ...]
    marks: tuple[str, ...]
    before: str
    middle: str
    after: str
    separator: str = ""
    end: str = ""
    parallel: bool = True

    def head(self, name: str) -> str:
        """A call up to its arguments."""
        return self.before + name + self.middle

    def written(self, calls: list[tuple[str, str]]) -> str:
        """Calls as an answer has them: names, and arguments as JSON texts."""
        texts = [self.head(name) + arguments + self.after for name, arguments in calls]
        return self.begins[0] + self.separator.join(texts) + self.end


HERMES = Syntax(
    begins=("<tool_call>\n",),
    marks=("<tool_call>",),
    before='{"name": "',
    middle='", "arguments": ',
    after="}\n</tool_call>",
    separator="\n<tool_call>\n",
)
"""Qwen2, Qwen2.5 and Qwen3, Hermes. Source: their chat templates."""

LLAMA3_JSON = Syntax(
    begins=("", "<|python_tag|>"),
    marks=("<|python_tag|>",),
    before='{"name": "',
    middle='", "parameters": ',
    after="}",
    parallel=False,
)
"""Llama 3.1 and 3.2, whose template takes one call a message. Source: their chat templates."""

MISTRAL = Syntax(
    begins=("[TOOL_CALLS] [", "[TOOL_CALLS]["),
    marks=("[TOOL_CALLS]",),
    before='{"name": "',
    middle='", "arguments": ',
    after="}",
    separator=", ",
    end="]",
)
"""Mistral 7B v0.3, Nemo, Small and Large of 2024. Source: their chat templates."""

MISTRAL_ARGS = Syntax(
    begins=("[TOOL_CALLS]",),
    marks=("[TOOL_CALLS]",),
    before="",
    middle="[ARGS]",
    after="",
    separator="[TOOL_CALLS]",
)
"""Mistral Small 3.2, Devstral and Magistral of 2025. Source: their chat templates."""

SYNTAXES: Mapping[str, Syntax] = {
    "hermes": HERMES,
    "llama3_json": LLAMA3_JSON,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
    "generic": HERMES,
}
"""By the names of vLLM's --tool-call-parser, where mistral is both of Mistral's. generic: for models whose template
knows no tools; an instruction in the system message explains it."""
