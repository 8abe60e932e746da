"""Grammars over tokens: whatever a model prefers, the text follows them, and what cannot be followed is refused."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testing.small_tokenizers import byte_fallback_tokenizer, write_tokenizer

from mdi.checkpoint.bundled import SHIPPED
from mdi.core.batch import TokenSampling
from mdi.core.constraint import Constraint, json_rule
from mdi.core.errors import InputError
from mdi.engine.grammar import Grammars, Matcher
from mdi.layers.sampler import sample
from mdi.prompt.tokenizer import Tokenizer

PADDED = 720  # rows of a head: more than the bundled tokenizer has tokens
END = 682  # <|im_end|>
SUITE = json.loads((Path(__file__).parent / "json_schema_test_suite.json").read_text())["schemas"]
COSTLY = "it takes too long to follow"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SHIPPED)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(tokenizer, frozenset({END}), PADDED)
    yield grammars
    grammars.close()


def schema(given: Any) -> Constraint:
    return Constraint(f"start: {json_rule(given)}", "schema")


def answer(
    grammars: Grammars, tokenizer: Tokenizer, constraint: Constraint, seed: int, tokens: int = 300
) -> tuple[str, bool]:
    """The answer of a model that prefers ends of strings, lists and objects, and whether it ended."""
    matcher, ids = grammars.matcher(constraint), list[int]()
    chance = torch.Generator().manual_seed(seed)
    ends = [END, *(token_id for character in '"]}' for token_id in tokenizer.encode(character))]
    while len(ids) < tokens:
        logits = torch.randn(1, PADDED, generator=chance)
        logits[0, ends] += 3
        mask = matcher.mask({END}, may_end=True)
        [token] = sample(logits, [TokenSampling(0.0, 0, 1.0, 0.0, 0, 0, len(ids), token_mask=mask)])
        if token.id == END:
            return text_of(tokenizer, ids), True
        ids.append(token.id)
        matcher.push(token.id)
        if matcher.complete:
            return text_of(tokenizer, ids), True
    return text_of(tokenizer, ids), False


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.backend.decode(ids)
    assert text.encode() == b"".join(map(tokenizer.token_bytes, ids)) or "\ufffd" in text
    return text


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-f]{3}/[0-9]{2}",
        "(yes|no|日本|🦊)",
        r"\{.*\}",
        r"-?[0-9]+(\.[0-9]+)?",
        "(a|ab)*c?",
        r"[^@ ]{1,4}@[a-z]{1,4}\.(com|org)",
        "a\\\\b",
    ],
)
def test_a_text_matches_its_regular_expression(grammars: Grammars, tokenizer: Tokenizer, pattern: str) -> None:
    constraint = Constraint("start: /" + pattern.replace("/", r"\/") + "/", "regex")
    answers = [answer(grammars, tokenizer, constraint, seed) for seed in range(8)]
    assert any(ended for _, ended in answers)
    assert all(re.fullmatch(pattern, text) for text, ended in answers if ended)


@pytest.mark.slow
def test_answers_follow_the_schemas_of_a_public_suite(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """JSON-Schema-Test-Suite, drafts 7 and 2020-12. What is not supported is refused, never ignored."""
    supported, ended = 0, 0
    for number, shape in enumerate(SUITE):
        try:
            text, complete = answer(grammars, tokenizer, schema(shape), seed=number, tokens=100)
        except InputError:
            continue
        supported += 1
        ended += complete
        if complete:
            jsonschema.validate(json.loads(text), shape)
    assert (supported, len(SUITE)) == (206, 431)
    assert ended > 200


json_texts = st.text(string.ascii_letters + string.digits + ' "\\/é日🦊\n', max_size=5)
json_leaves = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-99, 99),
        st.integers(0, 99),
    ),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 8)),
    st.builds(lambda values: {"enum": values}, st.lists(json_texts, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, json_texts),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]),
)
json_schemas = st.recursive(
    json_leaves,
    lambda inner: st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:required],
                "additionalProperties": False,
            },
            st.dictionaries(json_texts, inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@given(given=json_schemas, seed=st.integers(0, 1000))
def test_whatever_a_model_prefers_its_answer_follows_the_schema(
    grammars: Grammars, tokenizer: Tokenizer, given: dict[str, Any], seed: int
) -> None:
    text, ended = answer(grammars, tokenizer, schema(given), seed)
    if ended:
        jsonschema.validate(json.loads(text), given)
        assert "\n" not in text


def test_words_that_start_with_a_space_are_no_hindrance(tmp_path: Path) -> None:
    """Tokenizers that put a space before a text, as in Llama 2: byte tokens stand for characters without a token."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, byte_fallback_tokenizer(), "{{ messages }}"))
    grammars = Grammars(tokenizer, frozenset({2}), 400)
    matcher = grammars.matcher(schema({"const": "the thing é"}))
    written = list[int]()
    while not matcher.complete:
        mask = int.from_bytes(matcher.mask((), may_end=True), "little")
        written.append(mask.bit_length() - 1)
        matcher.push(written[-1])
    grammars.close()
    assert tokenizer.backend.decode(written) == '"the thing é"'


def test_the_mask_depends_on_the_text_so_far_only(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = schema({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    ids = tokenizer.encode('{"a": "xyz", "b": [1, {"c": null}]}')
    first, second = grammars.matcher(constraint), grammars.matcher(constraint)
    masks = [_masks(matcher, ids) for matcher in (first, second)]
    assert masks[0] == masks[1]
    assert len(set(masks[0])) > 3
    assert first.complete


def _masks(matcher: Matcher, ids: list[int]) -> list[bytes]:
    masks = []
    for token_id in ids:
        masks.append(matcher.mask({END}, may_end=True))
        matcher.push(token_id)
    return masks


def allowed(mask: bytes) -> set[int]:
    return {token_id for token_id in range(8 * len(mask)) if mask[token_id // 8] >> token_id % 8 & 1}


def test_control_tokens_and_unused_rows_are_no_text(grammars: Grammars, tokenizer: Tokenizer) -> None:
    mask = grammars.matcher(Constraint(r"start: /(.|\n)*/", "regex")).mask({END}, may_end=True)
    control = set(tokenizer.special_ids) - {END}
    assert END in allowed(mask)
    assert not allowed(mask) & (control | set(range(tokenizer.backend.get_vocab_size(), PADDED)))
    assert len(allowed(mask)) > 500


def test_an_end_is_allowed_where_the_grammar_allows_it(grammars: Grammars, tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    matcher = grammars.matcher(Constraint('start: "a" "b"* "c"?', "grammar"))
    assert END not in allowed(matcher.mask({END}, may_end=True))
    matcher.push(a)
    assert END in allowed(matcher.mask({END}, may_end=True))
    assert END not in allowed(matcher.mask({END}, may_end=False))
    assert b in allowed(matcher.mask({b, END}, may_end=True))
    assert b not in allowed(matcher.mask({b, END}, may_end=False))
    matcher.push(b)
    only_c = grammars.matcher(Constraint('start: "c"', "grammar"))
    [c] = tokenizer.encode("c")
    assert allowed(only_c.mask({c}, may_end=False)) == {c}


@pytest.mark.parametrize(
    ("constraint", "cause"),
    [
        (schema({"type": "array", "uniqueItems": True}), 'the keywords "uniqueItems" are not supported'),
        (schema({"type": "strin"}), "strin"),
        (schema({"type": "string", "format": "no"}), "Unknown format: no"),
        (schema(False), 'the keywords "not" are not supported'),
        (schema({"$ref": "#/$defs/none"}), "none"),
        (schema({"$ref": "https://example.com/schema.json"}), "'https://example.com/schema.json' is not present"),
        (schema({"$ref": "file:///etc/passwd"}), "'file:///etc/passwd' is not present"),
        (schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "no text follows it"),
        (schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (schema({"type": "integer", "minimum": 5, "maximum": 4}), "minimum"),
        (Constraint("start: /(/", "regex"), '"(" (in regex): regex parse error: unclosed group'),
        (Constraint("root ::= [0-9]", "grammar"), "1("),
        (Constraint("begin: /a/", "grammar"), "no start rule"),
        (Constraint("start: other", "grammar"), 'unknown name: "other"'),
        (Constraint('start: ""', "choice"), "allows no text but the empty one"),
    ],
)
def test_what_is_malformed_or_not_supported_is_refused_with_its_cause(
    grammars: Grammars, constraint: Constraint, cause: str
) -> None:
    with pytest.raises(InputError, match=re.escape(cause)) as raised:
        grammars.matcher(constraint)
    assert str(raised.value).startswith(constraint.field)
    assert "\n" not in str(raised.value)
    assert raised.value.field == constraint.field


RING = "\n".join(f'r{number}: "{number}" r{(number + 1) % 6000}' for number in range(6000))


@pytest.mark.parametrize(
    "constraint",
    [
        *(
            pytest.param(costly, marks=pytest.mark.slow)
            for costly in (
                schema({"type": "string", "pattern": "^(a{1000}){1000}$"}),
                schema({"type": "integer", "multipleOf": 1234567}),
                schema({"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}}),
                Constraint("start: /((a{100}){100}){100}/", "regex"),
            )
        ),
        schema({"enum": ["x" * 20000 + str(number) for number in range(10)]}),
        Constraint('start: (((("a" | "b"){1,1000}){1,1000}){1,1000})', "grammar"),
        Constraint(f"start: r0\n{RING}", "grammar"),  # ends the process that tries it
    ],
)
def test_a_hostile_grammar_is_refused_and_the_next_one_served(grammars: Grammars, constraint: Constraint) -> None:
    with pytest.raises(InputError, match=COSTLY):
        grammars.matcher(constraint)
    assert grammars.matcher(Constraint('start: "a"', "grammar")).mask((), may_end=True)


@pytest.mark.parametrize(
    "given",
    [
        {"enum": [f"value {number}" for number in range(5000)]},
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(300)}, "required": ["p1"]},
        {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
        {"type": "string", "maxLength": 100000},
    ],
)
def test_large_schemas_are_served(grammars: Grammars, given: Any) -> None:
    assert grammars.matcher(schema(given)).mask((), may_end=True)


def test_a_grammar_that_needed_too_many_states_is_compiled_again(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraint = Constraint("start: /[ab]{300}/", "regex")
    used = grammars.matcher(constraint)
    monkeypatch.setattr(Matcher, "usable", False)
    again = grammars.matcher(constraint)
    assert again is not used
    assert again.mask((), may_end=True) == used.mask((), may_end=True)
