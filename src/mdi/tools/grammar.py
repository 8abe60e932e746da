"""Grammars that hold calls of tools to their names and schemas, in llguidance's Lark dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from mdi.core.constraint import Constraint, closed, json_rule
from mdi.core.tools import Tool, ToolChoice
from mdi.tools.syntax import Syntax


def calls_constraint(
    syntax: Syntax,
    tools: Sequence[Tool],
    choice: ToolChoice,
    special: Mapping[str, int],
    content: Constraint | None = None,
) -> Constraint:
    """What an answer with these tools follows.

    special: marks that are special tokens, with their ids. content: what an answer that calls no tool follows.

    Without content, auto leaves the text free until a call begins; from there on its name and arguments are held to
    the tools.
    """
    parallel = choice.parallel and syntax.parallel and choice.named is None
    free = choice.mode == "auto" and content is None
    repeats = free and parallel and not syntax.end  # without an end, each call begins with a mark of its own
    grammar = _grammar(syntax, tools, special, parallel=parallel and not repeats)
    if choice.mode == "auto" and content is not None:
        grammar = f"start: calls | content\n{grammar}content: {content.grammar.removeprefix('start: ')}\n"
    else:
        grammar = f"start: calls\n{grammar}"
    return Constraint(
        grammar,
        tools[0].field.partition("[")[0],
        begins=syntax.marks if free else (),
        opens=tuple(syntax.head(tool.name) for tool in tools) if free and "" in syntax.begins else (),
        repeats=free and parallel,
        parts=tuple((f"{tool.field}.parameters", f"start: {_arguments(tool)}") for tool in tools),
    )


def _grammar(syntax: Syntax, tools: Sequence[Tool], special: Mapping[str, int], *, parallel: bool) -> str:
    """The rules of calls. parallel: several may follow each other."""

    def literal(text: str) -> str:
        return _literal(text, special)

    more = f" ({literal(syntax.separator)} call)*" if parallel else ""
    rules = [
        f"calls: begin call{more} {literal(syntax.end)}",
        "begin: " + " | ".join(map(literal, syntax.begins)),
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        rules.append(f"call_{number}: {literal(syntax.head(tool.name))} arguments_{number} {literal(syntax.after)}")
        rules.append(f"arguments_{number}: {_arguments(tool)}")
    return "".join(f"{rule}\n" for rule in rules)


def _arguments(tool: Tool) -> str:
    return json_rule(closed(tool.schema))


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text as Lark writes it. A mark that is a special token may be that token, or its text."""
    pattern = "|".join(map(re.escape, special))
    pieces = re.split(f"({pattern})", text) if special else [text]
    written = (
        f"(<[{special[piece]}]> | {json.dumps(piece)})" if piece in special else json.dumps(piece)
        for piece in pieces
        if piece
    )
    return " ".join(written) or '""'
