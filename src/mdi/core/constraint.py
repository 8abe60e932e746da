"""What an answer must look like: a grammar for its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLANKS = " "
"""What may stand between the parts of JSON, or nothing: without a limit, a weak model writes blanks to its end."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that the text of every answer to a request follows.

    grammar: in llguidance's dialect of Lark (its docs/syntax.md): `%json {...}` embeds a JSON schema, `/.../` a regular
    expression, and `<|name|>` a special token. field: the request's name for it, for errors.

    begins: the grammar holds from the first of these texts on, which is its own beginning; before, an answer is free.
    opens: the same for texts that count at an answer's start only. Without either it holds from the start. repeats:
    where the grammar is complete, the answer is free again; otherwise it ends.
    parts: grammars within this one, by the request's names for them: an error names the first that has one.
    """

    grammar: str
    field: str
    begins: tuple[str, ...] = ()
    opens: tuple[str, ...] = ()
    repeats: bool = False
    parts: tuple[tuple[str, str], ...] = ()


def json_rule(schema: Mapping[str, Any] | bool, blanks: str = BLANKS) -> str:
    """The part of a grammar that is JSON of a schema. blanks: a regular expression for what may stand between parts."""
    given = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return "%json " + json.dumps({**given, "x-guidance": {"whitespace_pattern": blanks}})
