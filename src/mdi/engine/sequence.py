"""A request and its sequences: all state of what is being generated. Modules hold weights, a `Sequence` holds state."""

from __future__ import annotations

import math
import secrets
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer
from torch import Tensor

from mdi.core.batch import LogitAdjustment, Token, TokenSampling, forced, token_bits
from mdi.core.constraint import Constraint
from mdi.core.errors import MDIError
from mdi.core.outputs import FinishReason, Piece
from mdi.core.sampling import Sampling
from mdi.engine.grammar_start import AfterThoughts, Rule
from mdi.engine.stream import Stream
from mdi.media import Work
from mdi.prompt.assembly import Media, Prompt
from mdi.prompt.detokenizer import Detokenizer


@dataclass(eq=False)
class Request:
    """One submitted request while it runs.

    prompt, sequences: None and empty until the prompt is ready; a sequence is removed when it ends.
    embeddings: one [tokens, width] for each encoded image or video of the prompt, in order; kept until the
    request ends, so that its prompt can be prefilled again.
    error: what ends it once none of its sequences is in flight.
    own_key: a prefix key that no other request has, for one that must compute all of its prompt.
    computes: False for one that ends as soon as its prompt is known.
    work: what preparing it may use; cancelled when its caller leaves. arrived_s: on the monotonic clock.
    prefilled: whether the first sample has computed the prompt, for the others to take over.
    constraint: what its answers must look like. rule: the constraint at the beginning of an answer, once compiled.
    marks: special tokens that the text shows although it leaves out others.
    """

    stream: Stream
    sampling: Sampling
    prompt: Prompt | None = None
    sequences: list[Sequence] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)
    cancelled: bool = False
    error: MDIError | None = None
    prefilled: bool = False
    computes: bool = True
    own_key: int = field(default_factory=lambda: -1 - secrets.randbits(160))
    constraint: Constraint | None = None
    rule: Rule | None = None
    marks: frozenset[int] = frozenset()
    work: Work = field(default_factory=Work)
    arrived_s: float = field(default_factory=time.monotonic)

    def set_prompt(self, prompt: Prompt, tokenizer: Tokenizer, end_ids: frozenset[int], sequence_length: int) -> None:
        """Makes the request's sequences. end_ids: tokens that end an answer, beside those the request names."""
        sampling, rule, thoughts = self.sampling, self.rule, prompt.thoughts
        self.prompt = prompt
        self.stream.prompt_token_ids = prompt.token_ids
        self.stream.reached("prepared_s")
        self.stream.opens_thought = thoughts is not None and thoughts.opened
        max_tokens = min(sampling.max_tokens, sequence_length - len(prompt.token_ids))
        ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else end_ids)
        if rule and thoughts and thoughts.marks:
            rule = AfterThoughts(rule, thoughts.marks, opened=thoughts.opened)
        self.sequences = [
            Sequence(
                self,
                index,
                prompt,
                detokenizer_of(sampling, tokenizer, self.marks),
                max_tokens,
                ends,
                rule and rule.copy(),
            )
            for index in range(sampling.n)
        ]

    @property
    def encoded(self) -> bool:
        return self.prompt is not None and len(self.embeddings) == len(self.prompt.media)

    def add_embeddings(self, embeddings: Tensor) -> None:
        """Takes those of the next image or video. When all are there, the memory of their rows is released."""
        self.embeddings.append(embeddings)
        if self.encoded:
            assert self.prompt is not None
            self.stream.reached("encoded_s")
            self.prompt = self.prompt.without_rows()
            for sequence in self.sequences:
                sequence.prompt = self.prompt
            self.work.release()

    @property
    def next_media(self) -> Media:
        """The first image or video that is not encoded."""
        assert self.prompt is not None
        return self.prompt.media[len(self.embeddings)]


def detokenizer_of(sampling: Sampling, tokenizer: Tokenizer, marks: frozenset[int] = frozenset()) -> Detokenizer:
    """The detokenizer of one sample. marks: special tokens that it always shows."""
    return Detokenizer(
        tokenizer,
        sampling.stop,
        min_tokens=sampling.min_tokens,
        skip_special_tokens=sampling.skip_special_tokens,
        marks=marks,
        include_stop=sampling.include_stop_str_in_output,
    )


class SeenTokens:
    """What penalties depend on: the tokens of prompt and answer, and how often the answer has each of its own.

    In the form of `LogitAdjustment`, kept up to date: no step goes through a long prompt. prompt: tokens that count.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self.bits = token_bits(prompt)
        self.ids, self.counts = array("I"), array("I")
        self._places: dict[int, int] = {}

    def add(self, token_id: int) -> None:
        """Takes the next token of the answer."""
        place = self._places.setdefault(token_id, len(self.ids))
        if place < len(self.ids):
            self.counts[place] += 1
            return
        self.ids.append(token_id)
        self.counts.append(1)
        self.bits.extend(bytes(max(0, token_id // 8 + 1 - len(self.bits))))
        self.bits[token_id // 8] |= 1 << token_id % 8


@dataclass(eq=False)
class Sequence:
    """Sample `index` of a request.

    end_ids: tokens that end it. rule: what may come next in it; None allows all. finished: its answer is complete.
    in_flight, arrival: see `scheduler.Schedulable`.
    slot, computed, cached_tokens, prefix_keys: see `slots.Cached`.
    """

    request: Request
    index: int
    prompt: Prompt
    detokenizer: Detokenizer
    max_tokens: int
    end_ids: frozenset[int]
    rule: Rule | None = None
    generated: list[int] = field(default_factory=list)
    slot: int | None = None
    computed: int = 0
    cached_tokens: int | None = None
    arrival: int = 0
    in_flight: bool = False
    finished: bool = False
    _unsent: list[Token] = field(default_factory=list)
    _prompt_logprobs: list[Token] = field(default_factory=list)
    _seen: SeenTokens = field(init=False)

    def __post_init__(self) -> None:
        self._seen = SeenTokens(self.prompt.token_ids if self.request.sampling.repetition_penalty != 1 else ())
        self.prefix_keys = list(self.prompt.prefix_keys)
        if self.request.sampling.prompt_logprobs is not None:
            self.prefix_keys[0] = self.request.own_key

    @property
    def length(self) -> int:
        return len(self.prompt.token_ids) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Tokens that are known but not computed: 1 in decode, more in prefill."""
        return self.length - self.computed

    @property
    def blocked(self) -> bool:
        """Whether it waits until its media are encoded, or until the first sample has computed the prompt."""
        return not self.request.encoded or (self.index > 0 and not self.request.prefilled)

    def align_to_media(self, length: int) -> int:
        """See `slots.Cached`."""
        for media in self.prompt.media:
            if media.span.start < length < media.span.start + media.span.length:
                return media.span.start
        return length

    def token_ids(self, start: int, end: int) -> list[int]:
        """The tokens at indices [start, end), of prompt and answer together."""
        prompt = self.prompt.token_ids
        return [*prompt[start:end], *self.generated[max(0, start - len(prompt)) : max(0, end - len(prompt))]]

    def samplings(self, start: int, end: int, *, draws: bool) -> tuple[TokenSampling, ...]:
        """How tokens are drawn after those in [start, end): the prompt's own, for their logprobs, and a new one."""
        return (*self._prompt_samplings(start, end), *((self.sampling(),) if draws else ()))

    def _prompt_samplings(self, start: int, end: int) -> list[TokenSampling]:
        """For the prompt's tokens behind those in [start, end), which are drawn as they are known."""
        top_logprobs, ids = self.request.sampling.prompt_logprobs, self.prompt.token_ids
        if top_logprobs is None or self.index > 0:
            return []
        first = max(start, len(self._prompt_logprobs))
        return [forced(ids[place], place, top_logprobs) for place in range(first + 1, min(end + 1, len(ids)))]

    def sampling(self) -> TokenSampling:
        """How the token after all known ones is drawn."""
        params, token_mask = self.request.sampling, self._token_mask()
        return TokenSampling(
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            self.index,
            position=self.length,
            top_logprobs=params.top_logprobs,
            adjustment=self._adjustment(masked=token_mask is not None),
            token_mask=token_mask,
        )

    def _token_mask(self) -> bytes | None:
        if self.rule is None:
            return None
        return self.rule.mask(self.end_ids, may_end=len(self.generated) >= self.request.sampling.min_tokens)

    def _adjustment(self, *, masked: bool) -> LogitAdjustment | None:
        """masked: a mask says whether the answer may end here."""
        params = self.request.sampling
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        biases = dict(params.logit_bias)
        if not masked and len(self.generated) < params.min_tokens:
            biases |= dict.fromkeys(self.end_ids, -math.inf)
        if not penalised and not biases:
            return None
        seen = self._seen if penalised else SeenTokens()
        return LogitAdjustment(
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            bytes(seen.bits),
            seen.ids.tobytes(),
            seen.counts.tobytes(),
            tuple(biases),
            tuple(biases.values()),
        )

    def append(self, tokens: Iterable[Token]) -> Piece | None:
        """Takes the tokens that one slice drew, up to the first that ends the answer: that sets `finished`.

        Raises InputError where the request's constraint cannot be followed any further.
        Returns the piece of text that became certain, if any.
        """
        drawn = self._without_prompt(tuple(tokens))
        if not drawn:
            return None
        self.request.prefilled = True
        text, reason = "", None
        for token in drawn:
            self.generated.append(token.id)
            self.prefix_keys.append(token.id)
            self._seen.add(token.id)
            self._unsent.append(replace(token, time_s=time.perf_counter()))
            text += self.detokenizer.push(token.id)
            if reason := self._finish_reason(token.id):
                self.finished = True
                text += self.detokenizer.finish()
                break
        if not text and not reason:
            return None
        unsent, self._unsent = tuple(self._unsent), []
        return Piece(self.index, text, unsent, reason, self._stopped_by() if reason == "stop" else None)

    def _without_prompt(self, tokens: tuple[Token, ...]) -> tuple[Token, ...]:
        """Keeps those tokens of a slice that are the prompt's own; gives the others."""
        if self.request.sampling.prompt_logprobs is None or self.index > 0:
            return tokens
        missing = len(self.prompt.token_ids) - 1 - len(self._prompt_logprobs)
        self._prompt_logprobs += tokens[:missing]
        if len(tokens) > missing:
            self.request.stream.prompt_logprobs = tuple(self._prompt_logprobs)
        return tokens[missing:]

    def _stopped_by(self) -> str | int | None:
        last = self.generated[-1]
        return self.detokenizer.stopped_by or (last if last in self.request.sampling.stop_token_ids else None)

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        if token_id in self.end_ids or self.detokenizer.stopped_by:
            return "stop"
        if self.rule:
            self.rule.push(token_id)
            if self.rule.complete:
                return "stop"
        return "length" if len(self.generated) >= self.max_tokens else None
