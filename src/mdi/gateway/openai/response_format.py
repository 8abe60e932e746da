"""What an answer must look like, as requests ask for it: OpenAI's `response_format`, vLLM's `structured_outputs` and
its older `guided_*` fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from mdi.core.constraint import BLANKS, Constraint, closed, json_rule
from mdi.core.errors import InputError
from mdi.core.sampling import Flag
from mdi.core.unknown_fields import UnknownField
from mdi.core.values import as_whole, checked_json, checked_text
from mdi.gateway.schemas import GatewayRequest

MAX_CHARACTERS = 256 * 1024  # of a schema or grammar
MAX_DEPTH = 64  # of a schema: an object inside of an object takes two
MAX_CHOICES = 4096
MAX_TAGS = 128
ANY_OBJECT = {"type": "object"}

Schema = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "null"}]})]
"""A JSON schema; its text is read as well."""

Text = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_CHARACTERS)]
Choices = Annotated[list[Annotated[str, Field(strict=True)]], Field(min_length=1, max_length=MAX_CHOICES)]


class JsonSchemaFormat(BaseModel):
    """OpenAI's json_schema. Only the schema matters, which is followed whether or not it is `strict`."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(strict=True, pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    given: dict[str, Any] = Field(alias="schema")
    strict: Flag | None = None


class TaggedStructure(BaseModel):
    """JSON of a schema between two texts."""

    model_config = ConfigDict(extra="allow")

    begin: Text
    given: dict[str, Any] = Field(alias="schema")
    end: Annotated[str, Field(strict=True, max_length=MAX_CHARACTERS)] = ""


class ResponseFormat(BaseModel):
    """OpenAI's response_format, and vLLM's structural_tag: the answer is free until it writes one of the `triggers`,
    with which each of the `structures` begins, and free again behind a structure.
    """

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: Annotated[list[TaggedStructure], Field(min_length=1, max_length=MAX_TAGS)] | None = None
    triggers: Annotated[list[Text], Field(min_length=1, max_length=MAX_TAGS)] | None = None

    def constraints(self) -> Iterator[Constraint]:
        """What it asks for, which may be nothing."""
        if self.type == "json_object":
            yield _json(ANY_OBJECT, BLANKS, "response_format")
        elif self.type == "json_schema":
            if self.json_schema is None:
                raise InputError("response_format.json_schema is missing", "response_format.json_schema")
            yield _json(self.json_schema.given, BLANKS, "response_format.json_schema.schema")
        elif self.type == "structural_tag":
            yield self._tags()

    def _tags(self) -> Constraint:
        if not self.structures or not self.triggers:
            missing = "triggers" if self.structures else "structures"
            raise InputError(f"response_format.{missing} is missing", f"response_format.{missing}")
        rules, parts = list[str](), list[tuple[str, str]]()
        for index, tag in enumerate(self.structures):
            place = f"response_format.structures[{index}]"
            if not tag.begin.startswith(tuple(self.triggers)):
                raise InputError(f"{place}.begin must start with one of the triggers", f"{place}.begin")
            rule = json_rule(closed(_schema(tag.given, f"{place}.schema")))
            begin, end = (checked_text(text, place) for text in (tag.begin, tag.end))
            rules.append(f"{_quoted(begin)} {rule} {_quoted(end) if end else ''}")
            parts.append((f"{place}.schema", f"start: {rule}"))
        grammar = "start: " + " | ".join(f"tag{index}" for index in range(len(rules)))
        named = "".join(f"\ntag{index}: {rule}" for index, rule in enumerate(rules))
        return Constraint(
            grammar + named, "response_format", begins=tuple(self.triggers), repeats=True, parts=tuple(parts)
        )


class StructuredOutputs(BaseModel):
    """vLLM's structured_outputs.

    whitespace_pattern: what may stand between the parts of JSON, in place of `BLANKS`; disable_any_whitespace: nothing.
    disable_additional_properties: false lets objects have properties that the schema does not list: see `closed`.
    """

    model_config = ConfigDict(extra="allow")

    given_json: Schema = Field(None, alias="json")
    json_object: Flag | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    whitespace_pattern: Text | None = None
    disable_any_whitespace: Flag | None = None
    disable_additional_properties: Flag | None = None

    def constraints(self, prefix: str = "structured_outputs.") -> Iterator[Constraint]:
        """What it asks for, field by field. prefix: of the fields' names in the request."""
        blanks = "" if self.disable_any_whitespace else self.whitespace_pattern or BLANKS
        if self.given_json is not None:
            yield _json(self.given_json, blanks, f"{prefix}json", is_open=self.disable_additional_properties is False)
        if self.json_object:
            yield _json(ANY_OBJECT, blanks, f"{prefix}json_object")
        if self.regex is not None:
            yield _regex(self.regex, f"{prefix}regex")
        if self.choice is not None:
            yield _choice(self.choice, f"{prefix}choice")
        if self.grammar is not None:
            yield Constraint(checked_text(self.grammar, f"{prefix}grammar"), f"{prefix}grammar")


class ConstrainedRequest(GatewayRequest):
    """A request whose answers may have to look a certain way."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    guided_whitespace_pattern: Text | None = None

    @property
    def constraint(self) -> Constraint | None:
        """Raises InputError where fields ask for more than one, and for what is no schema or text."""
        guided = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
            whitespace_pattern=self.guided_whitespace_pattern,
        )
        asked = [
            *(self.response_format.constraints() if self.response_format else ()),
            *(self.structured_outputs.constraints() if self.structured_outputs else ()),
            *guided.constraints("guided_"),
        ]
        if len(asked) > 1:
            names = " and ".join(constraint.field for constraint in asked)
            raise InputError(f"{names} constrain the answer: send one of them", asked[-1].field)
        return asked[0] if asked else None

    def check_constraint_fields(self, unknown: UnknownField) -> None:
        """Calls `unknown` with each unknown field of the constraint."""
        places = {
            "response_format": self.response_format,
            "response_format.json_schema": self.response_format and self.response_format.json_schema,
            "structured_outputs": self.structured_outputs,
        }
        for place, part in places.items():
            for name in (part and part.model_extra) or ():
                unknown(f"{place}.{name}")
        for index, tag in enumerate((self.response_format and self.response_format.structures) or ()):
            for name in tag.model_extra or ():
                unknown(f"response_format.structures[{index}].{name}")


def _json(given: Any, blanks: str, field: str, *, is_open: bool = False) -> Constraint:
    """JSON of a schema. is_open: objects may have properties that it does not list; see `closed`."""
    schema = _schema(given, field)
    return Constraint(f"start: {json_rule(schema if is_open else closed(schema), blanks)}", field)


def _schema(given: Any, field: str) -> Mapping[str, Any] | bool:
    """A JSON schema, given as JSON or as its text. Raises InputError for anything else, and for a large one."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise InputError(f"{field} is a text that is not valid JSON: send the schema itself", field) from None
    if not isinstance(given, (Mapping, bool)):
        raise InputError(f"{field} must be a JSON schema, which is an object", field)
    schema: Mapping[str, Any] | bool = _whole(checked_json(given, field, MAX_DEPTH))
    if (length := len(json.dumps(schema))) > MAX_CHARACTERS:
        raise InputError(f"{field} has {length} characters: a schema has at most {MAX_CHARACTERS}", field)
    return schema


def _whole(value: Any) -> Any:
    """A JSON value with 2.0 as 2, as JSON schemas count."""
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else as_whole(value)


def _regex(given: str, field: str) -> Constraint:
    """A regular expression as Lark writes it: on one line, between slashes."""
    written = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    text = re.sub(r"\\[\s\S]|/|\n", lambda found: written.get(found[0], found[0]), checked_text(given, field))
    return Constraint(f"start: /{text}/", field)


def _choice(given: Sequence[str], field: str) -> Constraint:
    texts = [checked_text(text, f"{field}[{index}]") for index, text in enumerate(given)]
    if (length := sum(map(len, texts))) > MAX_CHARACTERS:
        raise InputError(f"{field} has {length} characters: choices have at most {MAX_CHARACTERS} together", field)
    return Constraint("start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, texts)), field)


def _quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)
