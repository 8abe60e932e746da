"""Requests of other routes in the form of a chat, with the names of their own fields in errors and in warnings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mdi.core.errors import InputError
from mdi.core.unknown_fields import UnknownField
from mdi.gateway.answer_parts import AnswerReader
from mdi.gateway.engine import Submitted, TextEngine
from mdi.gateway.openai.chat import chat_prompt, submit_chat
from mdi.gateway.openai.schemas import ChatRequest, check_without_effect

PASSED = (
    *("top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens"),
    "include_stop_str_in_output",
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("chat_template_kwargs", "mm_processor_kwargs", "min_pixels", "max_pixels", "structured_outputs"),
)
"""A chat's fields that these routes have only here, and that mean what they mean in a chat."""


def passed_fields(
    extra: Mapping[str, Any] | None,
    unsupported: Mapping[str, tuple[Any, ...]],
    without_effect: Collection[str],
    unknown: UnknownField,
) -> dict[str, Any]:
    """The fields of `PASSED` among those that a route does not declare.

    unsupported: those that have only values without effect; without_effect: those with any value. Raises InputError.
    """
    passed: dict[str, Any] = {}
    for field, value in (extra or {}).items():
        if field in unsupported:
            check_without_effect(field, value, unsupported[field])
        elif field in PASSED:
            passed[field] = value
        elif field not in without_effect:
            unknown(field)
    return passed


@dataclass(frozen=True)
class AsChat:
    """A request in the form of a chat. body: its fields. names: the chat's names of places, and the request's own."""

    body: Mapping[str, Any]
    names: Mapping[str, str]

    def submit(self, engine: TextEngine, unknown: UnknownField) -> tuple[Submitted, AnswerReader]:
        """Starts the request. Raises what a chat's request raises, naming the request's own fields."""
        with self.own_names():
            return submit_chat(engine, self._request(unknown), self._own(unknown))

    def prepare(self, engine: TextEngine, unknown: UnknownField) -> Submitted:
        """Makes the prompt, and computes nothing. See `TextEngine.prepare`."""
        with self.own_names():
            request, own = self._request(unknown), self._own(unknown)
            conversation, pixels = chat_prompt(request, request.tool_use(own), own)
            return engine.prepare(conversation, **pixels)

    @contextmanager
    def own_names(self) -> Iterator[None]:
        """Errors name the fields as this request has them."""
        try:
            yield
        except InputError as error:
            error.args = (self._named(str(error)),)
            error.field = error.field and self._named(error.field)
            raise

    def _request(self, unknown: UnknownField) -> ChatRequest:
        request = ChatRequest.model_validate(dict(self.body))
        request.check_fields(self._own(unknown))
        return request

    def _own(self, unknown: UnknownField) -> UnknownField:
        return lambda path: unknown(self._named(path))

    def _named(self, text: str) -> str:
        longest_first = sorted(self.names, key=len, reverse=True)
        places = "|".join(map(re.escape, longest_first))
        return re.sub(rf"(?<![\w.])({places})(?!\w)", lambda found: self.names[found[0]], text)
