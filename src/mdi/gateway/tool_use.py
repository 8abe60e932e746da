"""What an answer may call, for all routes that answer chats: from the request's tools to the reader of the answer."""

from __future__ import annotations

from dataclasses import dataclass

from mdi.core.capabilities import Capabilities
from mdi.core.constraint import Constraint
from mdi.core.tools import Tool, ToolChoice
from mdi.gateway.answer_parts import AnswerReader
from mdi.gateway.engine import Submitted
from mdi.tools.grammar import calls_constraint
from mdi.tools.syntax import SYNTAXES

NO_CALLS = ToolChoice("none")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and its choice among them."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = NO_CALLS

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the prompt describes: none where none may be called."""
        return () if self.choice.mode == "none" else self.tools

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        return self.choice.among(self.offered)

    def marks(self, capabilities: Capabilities) -> tuple[str, ...]:
        """What the answer's text must have for its reader, also where it is special tokens."""
        calls = SYNTAXES[capabilities.tool_syntax].marks if self.callable else ()
        return (*calls, *(capabilities.reasoning or ()))

    def constraint(self, capabilities: Capabilities, content: Constraint | None) -> Constraint | None:
        """What the answer must look like. content: what it must look like where it calls no tool."""
        if not self.callable:
            return content
        syntax = SYNTAXES[capabilities.tool_syntax]
        return calls_constraint(syntax, self.callable, self.choice, capabilities.special_marks, content)

    def reader(self, capabilities: Capabilities, running: Submitted) -> AnswerReader:
        """Reads the answer to the request."""
        return AnswerReader(
            capabilities.tool_syntax,
            [tool.name for tool in self.callable],
            named=self.choice.named is not None,
            thoughts=capabilities.reasoning,
            opened=lambda: running.opens_thought,
        )
