"""Sampling settings: `SamplingParams`, as a request gives them, and `Sampling`, with every default filled in."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from mdi.core.errors import InputError, invalid
from mdi.core.values import as_whole

MAX_SAMPLES = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKENS = 64
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_TOKEN_ID = 2**31

T = TypeVar("T")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence):
        raise ValueError("expected a string or strings")
    if len(stop) > MAX_STOP_STRINGS:
        raise ValueError(f"expected at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
    if not all(isinstance(text, str) for text in stop):
        raise ValueError("expected strings")
    for index, text in enumerate(stop):
        if len(text) > MAX_STOP_CHARACTERS:
            raise InputError(
                f"stop[{index}] has {len(text)} characters: a stop string has at most {MAX_STOP_CHARACTERS}",
                f"stop[{index}]",
            )
    return tuple(text for text in stop if text)


def _token_ids(ids: Sequence[int]) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKENS:
        raise ValueError(f"expected at most {MAX_STOP_TOKENS} tokens, got {len(ids)}")
    _check_token_ids(ids)
    return tuple(ids)


def _biases(biases: Mapping[int, float]) -> dict[int, float]:
    if len(biases) > MAX_BIASES:
        raise ValueError(f"expected at most {MAX_BIASES} tokens, got {len(biases)}")
    _check_token_ids(biases)
    if any(not -100 <= bias <= 100 for bias in biases.values()):
        raise ValueError("expected biases between -100 and 100")
    return dict(biases)


def _check_token_ids(ids: Sequence[int] | Mapping[int, float]) -> None:
    if wrong := [token_id for token_id in ids if not 0 <= token_id <= MAX_TOKEN_ID]:
        raise ValueError(f"expected token ids between 0 and {MAX_TOKEN_ID}, got {wrong[0]}")


def _zero_for_minus_one(top_k: Any) -> Any:
    return 0 if top_k == -1 else top_k


def _none_for_minus_one(value: Any) -> Any:
    return None if value == -1 else value


Whole = BeforeValidator(as_whole)
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Integer = Annotated[int, Field(strict=True), Whole]
Flag = Annotated[bool, Field(strict=True)]
TokenCount = Annotated[int, Field(strict=True, ge=1, le=2**31), Whole]
TokenLimit = Annotated[
    TokenCount | None, BeforeValidator(_none_for_minus_one, json_schema_input_type=TokenCount | Literal[-1] | None)
]
TopK = Annotated[
    int,
    Field(strict=True, ge=0, le=2**31),
    Whole,
    BeforeValidator(_zero_for_minus_one, json_schema_input_type=Annotated[int, Field(ge=-1, le=2**31)]),
]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), le=2**64 - 1), Whole]
SampleCount = Annotated[int, Field(strict=True, ge=1, le=MAX_SAMPLES), Whole]
TopLogprobsCount = Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), Whole]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[
    str | Sequence[str],
    BeforeValidator(
        _stop_strings,
        json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)],
    ),
]
TOKEN_ID_SCHEMA = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
TokenIdList = Annotated[
    Sequence[Integer],
    AfterValidator(_token_ids),
    WithJsonSchema({"type": "array", "items": TOKEN_ID_SCHEMA, "maxItems": MAX_STOP_TOKENS}),
]
Biases = Annotated[
    Mapping[int, Number],
    AfterValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        }
    ),
]


class SamplingParams(BaseModel):
    """Sampling settings of one request; None means "as the checkpoint's generation_config.json says".

    temperature: 0 is greedy, like all below 1e-5; the softmax's divisor otherwise.
    top_k: draw from the k most likely tokens; 0 and -1 are off.
    top_p: draw from the smallest set of tokens whose probability reaches p (nucleus sampling, arXiv:1904.09751);
        0 takes the likeliest.
    min_p: drop tokens less likely than min_p times the likeliest (arXiv:2407.01082).
    repetition_penalty: divides the logits above 0 of all tokens in prompt and answer, and multiplies those below
        (arXiv:1909.05858); 1 is off.
    presence_penalty: subtracted from the logits of tokens that are in the answer, as OpenAI's.
    frequency_penalty: subtracted once for each time that they are.
    logit_bias: added to the logits of these token ids, after penalties: -100 forbids, 100 forces.
    seed: decides each draw together with the token's position; None and -1 draw one at submission.
    stop: a string or strings that end the answer; they are not part of it. Kept as a tuple. At most 16, of at most
        4,096 characters each; empty ones are left out.
    include_stop_str_in_output: the stop string that ended the answer is its end.
    stop_token_ids: tokens that end the answer, beside the checkpoint's own.
    ignore_eos: the checkpoint's own end tokens do not end the answer.
    max_tokens: longest answer in tokens; None and -1 are as long as the sequence length allows.
    min_tokens: no token and no stop string ends the answer before it has so many tokens.
    skip_special_tokens: leave special tokens out of the text; False shows them (the boxes of Qwen-VL, also the token
        that ends the answer), as `decode` of transformers.
    top_logprobs: how many of the likeliest tokens are reported at each position.
    prompt_logprobs: how many of them are reported at each position of the prompt, beside its own tokens. The whole
        prompt is then computed, even if an earlier request had the same. None reports nothing of the prompt.
    n: independent samples of the same prompt.

    Raises InputError, naming the field, for values out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: TokenLimit = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_k: TopK | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Biases = {}
    seed: Annotated[Seed | None, BeforeValidator(_none_for_minus_one)] = None
    stop: StopStrings = ()
    include_stop_str_in_output: Flag = False
    stop_token_ids: TokenIdList = ()
    ignore_eos: Flag = False
    min_tokens: Annotated[int, Field(strict=True, ge=0, le=2**31), Whole] = 0
    skip_special_tokens: Flag = True
    top_logprobs: TopLogprobsCount = 0
    prompt_logprobs: TopLogprobsCount | None = None
    n: SampleCount = 1

    @model_validator(mode="wrap")
    @classmethod
    def _validated(cls, settings: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            params = validate(settings)
        except ValidationError as error:
            raise invalid(error.errors()) from None
        if params.max_tokens is not None and params.min_tokens > params.max_tokens:
            raise InputError(
                f"min_tokens is {params.min_tokens}, more than max_tokens, {params.max_tokens}", "min_tokens"
            )
        return params

    def resolved(self, defaults: SamplingParams, longest: int) -> Sampling:
        """Fills in what the request left open: from the checkpoint's defaults, and `longest` for max_tokens.

        An explicit temperature switches the checkpoint's top_k and top_p off unless the request sets them:
        instruct checkpoints ship top_k 1, which would make the temperature a no-op.
        """
        filters = defaults if self.temperature is None else SamplingParams()
        return Sampling(
            max_tokens=_first(self.max_tokens, longest),
            temperature=_first(self.temperature, defaults.temperature, 1.0),
            top_k=_first(self.top_k, filters.top_k, 0),
            top_p=_first(self.top_p, filters.top_p, 1.0),
            min_p=_first(self.min_p, defaults.min_p, 0.0),
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=_first(self.seed, secrets.randbits(63)),
            stop=tuple(self.stop),
            include_stop_str_in_output=self.include_stop_str_in_output,
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            top_logprobs=self.top_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            n=self.n,
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of a running request: see `SamplingParams`. Every default is filled in, the seed is drawn."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    min_tokens: int
    skip_special_tokens: bool
    top_logprobs: int
    prompt_logprobs: int | None
    n: int


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)
