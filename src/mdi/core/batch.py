"""A batch, the work of one pipeline step: tokens of several sequences, packed end to end without padding.

Knows slots and positions, and no requests, texts or networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # describing a batch needs no torch, which takes seconds to import
    import torch
    from torch import Tensor


MASK_ELSEWHERE = b""
"""A token mask that does not travel with the batch, but by itself to the node with the head."""


def token_bits(token_ids: Iterable[int]) -> bytearray:
    """A set of tokens: one bit for each, token 0 in the lowest bit of the first byte. Ends with the highest token."""
    distinct = set(token_ids)
    bits = bytearray(max(distinct, default=-1) // 8 + 1)
    for token in distinct:
        bits[token // 8] |= 1 << token % 8
    return bits


@dataclass(frozen=True, slots=True)
class LogitAdjustment:
    """Changes to one row of logits before a token is drawn: penalties for the tokens in `penalised`, then biases.

    The penalties are those of `SamplingParams`. penalised: tokens of prompt and answer, as `token_bits`. counted_ids:
    tokens of the answer; counts: how often each is in it; both unsigned, 4 bytes each, the lowest first. biases: added
    to the logits of `biased_ids`; minus infinity forbids a token.
    """

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalised: bytes
    counted_ids: bytes
    counts: bytes
    biased_ids: tuple[int, ...]
    biases: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """Settings for drawing one token. (seed, sample, position) decides the random number, on any node and in any batch.

    sample: index among the request's n samples. position: tokens of the sequence before the drawn one.
    top_logprobs: how many of the likeliest tokens are reported with it.
    token_mask: the tokens that are allowed, as `token_bits`; None allows all.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sample: int
    position: int
    top_logprobs: int = 0
    adjustment: LogitAdjustment | None = None
    token_mask: bytes | None = None


FROM_ALL_LOGITS = TokenSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
"""Stands for a sampling that takes all logits, where the draw is made elsewhere."""


def forced(token_id: int, position: int, top_logprobs: int) -> TokenSampling:
    """Settings that always draw this token, for its logprob: that of a token which is known already."""
    bias = LogitAdjustment(1.0, 0.0, 0.0, b"", b"", b"", (token_id,), (math.inf,))
    return TokenSampling(0.0, 0, 1.0, 0.0, 0, 0, position, top_logprobs, bias)


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of one sequence that one batch computes: `length` tokens from position `start` of the slot's KV cache.

    samplings: how to draw after each of the slice's last tokens, at most `length` of them: one in decode, several where
    draft tokens are verified or a prompt's logprobs are asked for, none in the middle of another prefill.
    """

    slot: int
    start: int
    length: int
    samplings: tuple[TokenSampling, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length


CACHE_BLOCK = 64
"""Tokens of a slot that the KV cache gives memory for at a time."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Copies the first `length` tokens of one slot's cache into another's."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Release:
    """Gives back the memory of a slot's cache behind its first `kept` tokens."""

    slot: int
    kept: int


CacheEdit = Copy | Release


@dataclass(frozen=True, slots=True)
class Deepstack:
    """Features of images and videos that decoder layers add to their outputs (DeepStack, arXiv:2406.04334).

    rows: those of visual tokens in the packed batch, rising, int64 [visual tokens]. features: [layers, visual tokens,
    hidden_size], of `first_layer` and of the layers after it.
    """

    rows: Tensor
    features: Tensor
    first_layer: int = 0

    def to(self, device: torch.device) -> Deepstack:
        return replace(self, rows=self.rows.to(device), features=self.features.to(device))

    def beyond(self, layer: int) -> Deepstack | None:
        """What layers from `layer` on add; None where they add nothing."""
        left = self.features[layer - self.first_layer :]
        return Deepstack(self.rows, left, layer) if len(left) else None

    def between(self, start: int, end: int) -> Deepstack | None:
        """The same for a batch of the rows [start, end); None where none of them is visual."""
        inside = (self.rows >= start) & (self.rows < end)
        if not inside.any():
            return None
        return Deepstack(self.rows[inside] - start, self.features[:, inside], self.first_layer)


@dataclass(frozen=True, slots=True)
class Batch:
    """One pipeline step. `positions` are the rotary positions of all packed tokens: int64 [3, tokens] (t, h, w).

    edits: of the KV cache, done first, one after the other. deepstack: what layers that are not computed yet add.
    """

    id: int
    slices: tuple[Slice, ...]
    positions: Tensor
    edits: tuple[CacheEdit, ...] = ()
    deepstack: Deepstack | None = None

    @property
    def n_tokens(self) -> int:
        return sum(part.length for part in self.slices)

    @property
    def prefills(self) -> bool:
        """Whether it computes more than the newest token of running sequences."""
        return any(part.length > 1 for part in self.slices)

    @property
    def sampled_rows(self) -> list[int]:
        """Rows of the packed batch whose logits are sampled: the last ones of each slice with samplings."""
        rows, end = list[int](), 0
        for part in self.slices:
            end += part.length
            rows += range(end - len(part.samplings), end)
        return rows

    @property
    def samplings(self) -> list[TokenSampling]:
        """The settings for drawing from each of `sampled_rows`."""
        return [sampling for part in self.slices for sampling in part.samplings]

    @property
    def token_masks(self) -> list[bytes]:
        """The masks of the samplings that have one."""
        return [sampling.token_mask for sampling in self.samplings if sampling.token_mask is not None]

    def beyond(self, layer: int) -> Batch:
        """The same batch for the stages that compute the layers from `layer` on."""
        return replace(self, deepstack=self.deepstack.beyond(layer)) if self.deepstack else self

    def without_adjustments(self) -> Batch:
        """The same batch for ranks that draw nothing: `FROM_ALL_LOGITS` for samplings with an adjustment or a mask."""

        def plain(sampling: TokenSampling) -> TokenSampling:
            is_plain = sampling.adjustment is None and sampling.token_mask is None
            return sampling if is_plain else FROM_ALL_LOGITS

        slices = (replace(part, samplings=tuple(map(plain, part.samplings))) for part in self.slices)
        return replace(self, slices=tuple(slices))

    def with_token_masks(self, masks: Sequence[bytes]) -> Batch:
        """The same batch with these masks in place of `token_masks`."""
        left = iter(masks)

        def masked(sampling: TokenSampling) -> TokenSampling:
            return sampling if sampling.token_mask is None else replace(sampling, token_mask=next(left))

        slices = (replace(part, samplings=tuple(map(masked, part.samplings))) for part in self.slices)
        return replace(self, slices=tuple(slices))


@dataclass(frozen=True, slots=True)
class Visual:
    """Encoded image or video tokens that replace the placeholders' embeddings from packed row `row` on.

    embeddings: [visual tokens, width], as the tower makes them: see `VisionConfig.embedding_width`.
    """

    row: int
    embeddings: Tensor


@dataclass(frozen=True, slots=True)
class Token:
    """A drawn token and the natural logarithm of its probability under the model, before adjustment and filters.

    top_logprobs: the likeliest tokens and their logprobs, likeliest first. time_s: when the engine received it, by
    time.perf_counter; 0 before that.
    """

    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    time_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Result:
    """The drawn tokens of a batch: one for each of its samplings, in order.

    overflowed: indices of slices with numbers that are infinite or none at all. Their tokens mean nothing.
    """

    batch_id: int
    tokens: tuple[Token, ...]
    overflowed: tuple[int, ...] = ()
