"""Grammars of answers, through llguidance: compiled once, and one matcher for each sequence."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark, is_lark_syntax

from mdi.core.constraint import Constraint
from mdi.core.errors import InputError
from mdi.engine.grammar_check import GrammarChecker
from mdi.engine.grammar_start import WhenBegun
from mdi.prompt.tokenizer import Tokenizer

MAX_GBNF_CHARACTERS = 32 * 1024  # read by Python, some 200 a millisecond
MAX_KEPT = 16  # compiled grammars; one grows with the texts that follow it
LIMITS = LLParserLimits(verbose_errors=False)
GENERATED = ("failed to compile JSON schema: ", ": invalid regex ")  # behind it stands what the client wrote
UNSUPPORTED = re.compile(r"Unimplemented keys: \[(.*)\]")


class Grammars:
    """Compiles constraints for one tokenizer, which it takes apart at the first: that takes 2 s for 151,936 tokens.

    end_ids: the model's own end tokens, which are no text to any grammar. vocab_size: rows of the model's head; those
    beyond the tokenizer are never allowed. From any thread.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Matcher] = OrderedDict()
        names = {index: tokenizer.token_bytes(index).decode() for index in tokenizer.special_ids}
        self._checker = GrammarChecker(vocab_size, names)

    def rule(self, constraint: Constraint) -> Matcher | WhenBegun:
        """The constraint at the beginning of an answer. Raises what `matcher` does."""
        start = self.matcher(constraint)
        if not constraint.begins and not constraint.opens:
            return start
        return WhenBegun(start, constraint, self._text_of, self._tokenizer.special_marks)

    def matcher(self, constraint: Constraint) -> Matcher:
        """The constraint's grammar at its beginning.

        Raises InputError, naming the constraint's field, for a grammar that is malformed, not supported or too costly.
        """
        with self._lock:
            kept = self._kept.pop(constraint.grammar, None)
            start = kept if kept and kept.usable else self._compiled(constraint)
            self._kept[constraint.grammar] = start
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return start.copy(constraint.field)

    def close(self) -> None:
        """Ends the process that checks grammars."""
        with self._lock:
            self._checker.close()

    def _compiled(self, constraint: Constraint) -> Matcher:
        grammar = _lark(constraint)
        if error := self._checker.error(grammar):
            for field, grammar in constraint.parts:
                self._compiled(Constraint(grammar, field))
            raise InputError(f"{constraint.field}: {_cause(error)}", constraint.field)
        matcher = LLMatcher(self._parts, grammar, log_level=0, limits=LIMITS)
        start = Matcher(matcher, constraint.field, self._vocab_size, self._parts)
        if start.complete:
            raise InputError(f"{constraint.field} allows no text but the empty one", constraint.field)
        return start

    def _text_of(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id, skip_special_tokens=True)

    @cached_property
    def _parts(self) -> LLTokenizer:
        return LLTokenizer(_Vocabulary(self._tokenizer, self._end_ids, self._vocab_size))  # type: ignore[arg-type]


class Matcher:
    """Where one answer stands in its grammar. It depends on the answer's tokens, and on nothing else.

    complete: no text can follow. may_end: the text so far is a whole answer.
    """

    def __init__(self, matcher: LLMatcher, field: str, vocab_size: int, parts: LLTokenizer) -> None:
        self._matcher = matcher
        self._parts = parts
        self._field = field
        self._vocab_size = vocab_size
        self._look_ahead()

    def copy(self, field: str | None = None) -> Matcher:
        """Another answer at the same place. field: the request's name for the constraint, if it is another request."""
        copy = object.__new__(Matcher)
        copy.__dict__.update(self.__dict__, _matcher=self._matcher.deep_copy(), _field=field or self._field)
        return copy

    @property
    def usable(self) -> bool:
        """False once a copy, with which it shares the states of its text so far, needed too many of them."""
        copy = self._matcher.deep_copy()
        copy.compute_bitmask()
        return not copy.is_error()

    def push(self, token_id: int) -> None:
        """Takes the next token of the answer.

        Raises InputError where the grammar becomes too complex, or no token of the model goes on as it asks.
        """
        self._matcher.consume_token(token_id)
        self._look_ahead()

    def accepts(self, token_ids: Sequence[int]) -> bool:
        """Takes these tokens, if the grammar goes on so; if not, this matcher is of no more use."""
        if self._matcher.try_consume_tokens(list(token_ids)) < len(token_ids):
            return False
        self._look_ahead()
        return True

    def accepts_text(self, text: bytes) -> bool:
        """Takes a text, in whatever tokens. See `accepts`."""
        return self.accepts(self._parts.tokenize_bytes(text))

    def mask(self, end_ids: Iterable[int], *, may_end: bool) -> bytes:
        """The tokens that may come next, as `TokenSampling.token_mask`; never none of them.

        end_ids: tokens that end the answer: allowed where the grammar allows an end. may_end: whether they may come
        yet; if not, they come only where nothing else can.
        """
        mask = bytearray(self._bits)
        if not may_end:
            for token_id in end_ids:
                mask[token_id // 8] &= ~(1 << token_id % 8)
            return bytes(mask) if _any(mask) else self._bits
        if self.may_end:
            for token_id in end_ids:
                mask[token_id // 8] |= 1 << token_id % 8
        return bytes(mask)

    def _look_ahead(self) -> None:
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise InputError(f"{self._field}: {_cause(self._matcher.get_error())}", self._field)
        end, bit = divmod(self._vocab_size, 8)
        self.may_end = bool(bits[end] >> bit & 1)
        last = bits[end] & (1 << bit) - 1
        self._bits = bits[:end] + bytes([last]) if bit else bits[:end]
        self.complete = self.may_end and not _any(self._bits)
        if not self.may_end and not _any(self._bits):
            raise InputError(f"{self._field}: no token of the model goes on as it asks", self._field)


class _Vocabulary:
    """A tokenizer, as llguidance takes it apart: the text of every token, and how text is best written in tokens.

    The grammar's end is a token of its own behind the vocabulary: which tokens end an answer is up to each request.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = vocab_size
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)] + [b"<end>"]
        self.special_token_ids = sorted({*tokenizer.special_ids, *end_ids, vocab_size})

    def __call__(self, text: str) -> list[int]:
        """Plain text to the tokens that the model would write it in; their bytes are those of the text."""
        ids = self._tokenizer.encode(text)
        if b"".join(self.tokens[token_id] for token_id in ids) == text.encode():
            return ids
        return self._longest(text.encode())

    def _longest(self, data: bytes) -> list[int]:
        ids, start = list[int](), 0
        while start < len(data):
            ends = range(min(len(data), start + self._max_bytes), start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), None)
            if end is None:
                return ids
            ids.append(self._ids[data[start:end]])
            start = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = frozenset(self.special_token_ids)
        return {data: index for index, data in enumerate(self.tokens) if data and index not in special}

    @cached_property
    def _max_bytes(self) -> int:
        return max(map(len, self._ids))


def _lark(constraint: Constraint) -> str:
    """The constraint's grammar, which may be GBNF (llama.cpp, grammars/README.md) instead of Lark."""
    grammar, field = constraint.grammar, constraint.field
    if "::=" not in grammar or is_lark_syntax(grammar):
        return grammar
    if len(grammar) > MAX_GBNF_CHARACTERS:
        raise InputError(f"{field}: GBNF has at most {MAX_GBNF_CHARACTERS} characters: write it in Lark", field)
    try:
        return any_to_lark(grammar)
    except Exception as error:  # of any kind: it is no parser for strangers' texts
        cause = str(error).partition("\n")[0]
        raise InputError(f"{field}: {cause or 'it is no GBNF'}: write it in Lark, with a rule start", field) from None


def _any(bits: bytes | bytearray) -> bool:
    return bits.count(0) < len(bits)


def _cause(error: str) -> str:
    """What is wrong, in one line: llguidance shows the place in several."""
    what = UNSUPPORTED.sub(r"the keywords \1 are not supported", error.partition("\n")[0].removesuffix(":"))
    for own in GENERATED:
        what = what.partition(own)[2] or what
    detail = re.search("^error: (.*)", error, re.MULTILINE)
    return f"{what}: {detail[1]}" if detail else what
