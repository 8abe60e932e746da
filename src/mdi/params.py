"""How a request wants its tokens drawn. Validated on construction; knows nothing about models or HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mdi.errors import InputError

MAX_SAMPLES = 64
MAX_STOP_STRINGS = 16


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request; None means "as the checkpoint's generation_config.json says".

    temperature: 0 is greedy; the softmax's divisor otherwise.
    top_k: draw from the k most likely tokens; 0 is off.
    top_p: draw from the smallest set of tokens whose probability reaches p (nucleus sampling, arXiv:1904.09751).
    min_p: drop tokens less likely than min_p times the likeliest (arXiv:2407.01082).
    seed: with a position it decides each draw; None draws one at submission.
    stop: a string or strings that end the answer; they are not part of it. Kept as a tuple.
    max_tokens: longest answer in tokens; None is as long as the sequence length allows.
    n: independent samples of the same prompt.

    Raises InputError, naming the field, for values out of range.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check_int("max_tokens", self.max_tokens, 1, 2**31)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31)
        _check_float("top_p", self.top_p, 0.0, 1.0, exclusive_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InputError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", "stop")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError("stop takes non-empty strings", "stop")

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


def _check_float(field: str, value: Any, low: float, high: float, *, exclusive_low: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{field} must be a finite number, got {value!r}", field)
    if not low <= value <= high or (exclusive_low and value == low):
        bounds = f"above {low:g} and at most {high:g}" if exclusive_low else f"between {low:g} and {high:g}"
        raise InputError(f"{field} must be {bounds}, got {value:g}", field)
