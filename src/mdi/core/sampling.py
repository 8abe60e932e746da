"""How a request wants its tokens drawn. Validated on construction; knows nothing about models or HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mdi.core.errors import InputError

MAX_SAMPLES = 64
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 64
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_TOKEN_ID = 2**31


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request; None means "as the checkpoint's generation_config.json says".

    temperature: 0 is greedy; the softmax's divisor otherwise.
    top_k: draw from the k most likely tokens; 0 is off.
    top_p: draw from the smallest set of tokens whose probability reaches p (nucleus sampling, arXiv:1904.09751).
    min_p: drop tokens less likely than min_p times the likeliest (arXiv:2407.01082).
    repetition_penalty: divides the logits above 0 of all tokens in prompt and answer, and multiplies those below
        (arXiv:1909.05858); 1 is off.
    presence_penalty: taken off the logits of tokens that are in the answer, as OpenAI's.
    frequency_penalty: taken off once for each time that they are.
    logit_bias: added to the logits of these token ids, after penalties: -100 forbids, 100 forces.
    seed: with a position it decides each draw; None draws one at submission.
    stop: a string or strings that end the answer; they are not part of it. Kept as a tuple.
    stop_token_ids: tokens that end the answer, beside the checkpoint's own.
    ignore_eos: the checkpoint's own do not.
    max_tokens: longest answer in tokens; None is as long as the sequence length allows.
    min_tokens: no token ends the answer before it has so many.
    top_logprobs: how many of the likeliest tokens are told at each position.
    n: independent samples of the same prompt.

    Raises InputError, naming the field, for values out of range.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_logprobs: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_int("max_tokens", self.max_tokens, 1, 2**31)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31)
        _check_float("top_p", self.top_p, 0.0, 1.0, exclusive_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, exclusive_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("min_tokens", self.min_tokens, 0, 2**31)
        _check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InputError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", "stop")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError("stop takes non-empty strings", "stop")
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"ignore_eos must be true or false, got {self.ignore_eos!r}", "ignore_eos")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}", "min_tokens")
        _check_token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        _check_token_ids("logit_bias", tuple(self.logit_bias), MAX_BIASES)
        for bias in self.logit_bias.values():
            _check_float("logit_bias", bias, -100.0, 100.0)

    def with_defaults(self, defaults: SamplingParams) -> SamplingParams:
        """Fills what the request left open from the checkpoint's defaults.

        An explicit temperature switches the checkpoint's top_k and top_p off unless the request sets them: instruct
        checkpoints ship top_k 1, which would make the temperature a no-op.
        """
        own_temperature = self.temperature is not None
        return replace(
            self,
            temperature=_first(self.temperature, defaults.temperature, 1.0),
            top_k=_first(self.top_k, None if own_temperature else defaults.top_k, 0),
            top_p=_first(self.top_p, None if own_temperature else defaults.top_p, 1.0),
            min_p=_first(self.min_p, None if own_temperature else defaults.min_p, 0.0),
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _check_int(field: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{field} must be a whole number, got {value!r}", field)
    if not low <= value <= high:
        raise InputError(f"{field} must be between {low} and {high}, got {value}", field)


def _check_token_ids(field: str, ids: Sequence[Any], most: int) -> None:
    if len(ids) > most:
        raise InputError(f"{field} takes at most {most} tokens, got {len(ids)}", field)
    for token_id in ids:
        _check_int(field, token_id, 0, MAX_TOKEN_ID)


def _check_float(field: str, value: Any, low: float, high: float, *, exclusive_low: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{field} must be a finite number, got {value!r}", field)
    if not low <= value <= high or (exclusive_low and value == low):
        bounds = f"above {low:g} and at most {high:g}" if exclusive_low else f"between {low:g} and {high:g}"
        raise InputError(f"{field} must be {bounds}, got {value:g}", field)
