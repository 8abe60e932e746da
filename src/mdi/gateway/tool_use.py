"""What an answer may call, for all routes that answer chats: from the request's tools to the reader of the answer."""

from __future__ import annotations

from dataclasses import dataclass

from mdi.core.capabilities import Capabilities
from mdi.core.tools import Tool, ToolChoice
from mdi.gateway.answer_parts import AnswerReader
from mdi.gateway.engine import Submitted

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

    def reader(self, capabilities: Capabilities, running: Submitted) -> AnswerReader:
        """Reads the answer to the request."""
        callable_tools = self.choice.among(self.offered)
        return AnswerReader(
            capabilities.tool_syntax,
            [tool.name for tool in callable_tools],
            named=self.choice.named is not None,
            thoughts=capabilities.reasoning,
            opened=lambda: running.opens_thought,
        )
