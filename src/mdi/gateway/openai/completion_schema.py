"""The request of POST /v1/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from mdi.core.errors import InputError
from mdi.core.messages import RawText, TokenIds
from mdi.core.sampling import MAX_SAMPLES, Flag, TokenLimit, TopLogprobsCount
from mdi.core.values import as_whole, checked_text
from mdi.gateway.openai.schemas import OpenAIRequest


def _prompts(given: Any) -> dict[str, RawText | TokenIds]:
    """One prompt or several, by their places in the request: each is a text or a list of token ids."""
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], (int, float))):
        return {"prompt": _prompt(given, "prompt")}
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_SAMPLES:
        raise InputError(
            f"prompt must be a text, a list of token ids, or a list of 1 to {MAX_SAMPLES} of these", "prompt"
        )
    places = [f"prompt[{number}]" for number in range(len(given))]
    return {place: _prompt(prompt, place) for place, prompt in zip(places, given, strict=True)}


def _prompt(given: Any, path: str) -> RawText | TokenIds:
    if isinstance(given, str):
        return RawText(checked_text(given, path))
    if not isinstance(given, list):
        raise InputError(f"{path} must be a text or a list of token ids", path)
    ids = tuple(map(as_whole, given))
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise InputError(f"{path}[{index}] must be a token id, which is a whole number", f"{path}[{index}]")
    return TokenIds(ids)


PromptText = Annotated[str, Field(min_length=1)]
PromptIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[list[PromptText | PromptIds], Field(min_length=1, max_length=MAX_SAMPLES)]


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions.

    logprobs: how many of the likeliest tokens to report; 0 reports the drawn ones alone. echo: each text begins with
    its prompt. add_special_tokens: whether the tokenizer adds its own to a text, such as BOS.
    """

    prompt: Annotated[
        dict[str, RawText | TokenIds],
        PlainValidator(_prompts, json_schema_input_type=PromptText | PromptIds | Prompts),
    ]
    max_tokens: TokenLimit = 16
    echo: Flag = False
    add_special_tokens: Flag = True
    top_logprobs: TopLogprobsCount = Field(0, alias="logprobs")

    @property
    def wants_logprobs(self) -> bool:
        return "top_logprobs" in self.model_fields_set

    @property
    def prompt_logprobs_count(self) -> int | None:
        """How many likeliest tokens to report beside the prompt's own; None to report nothing of the prompt."""
        return self.top_logprobs if self.echo and self.wants_logprobs else None

    @property
    def prompts(self) -> dict[str, RawText | TokenIds]:
        """The prompts by their places in the request."""
        return {
            place: replace(prompt, add_special_tokens=self.add_special_tokens)
            if isinstance(prompt, RawText)
            else prompt
            for place, prompt in self.prompt.items()
        }
