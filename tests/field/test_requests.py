"""What clients send to OpenAI's routes: every form of it means what it means elsewhere, or is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.checkpoints import tiny_text_config
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2VLForConditionalGeneration

from mdi import Engine
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.messages import RawText
from mdi.core.sampling import SamplingParams
from tests.gateway.conftest import CHAT, FakeServer, RealServer, serving, with_part

FRANCE = "The capital of France is"
PREFIX = "<|fim_prefix|>def f(x):\n    <|fim_suffix|>\n<|fim_middle|>"


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model whose tokenizer starts every text with a BOS token, and knows tokens for fill-in-the-middle."""
    path = write_random_checkpoint(tmp_path_factory.mktemp("raw") / "llama-like", tiny_text_config())
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, name in enumerate(("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")):
        tokenizer["added_tokens"].append({"id": 259 + number, "content": name, **special})
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def theirs(model: Any, tokenizer: Any, ids: Sequence[int], n_tokens: int) -> str:
    """The greedy answer of transformers to token ids."""
    with torch.no_grad():
        out = model.generate(torch.tensor([list(ids)]), max_new_tokens=n_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def test_a_completion_continues_exactly_its_prompt(tiny: RealServer, tiny_checkpoint: Path) -> None:
    """A14, C7: strings, lists of strings, token ids and lists of them, with the text and the usage of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    first, second = tokenizer(FRANCE).input_ids, tokenizer("x = <|im_end|> 7").input_ids
    assert 258 in second  # names of special tokens are those tokens
    expected = [theirs(model, tokenizer, ids, 12) for ids in (first, second)]
    for prompt, texts, n_tokens in (
        (FRANCE, expected[:1], len(first)),
        ([FRANCE, "x = <|im_end|> 7"], expected, len(first) + len(second)),
        (first, expected[:1], len(first)),
        ([first, second], expected, len(first) + len(second)),
        ([FRANCE, second], expected, len(first) + len(second)),
        ([float(token) for token in first], expected[:1], len(first)),
    ):
        answer = tiny.client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)  # type: ignore[arg-type]
        assert [choice.text for choice in answer.choices] == texts
        assert answer.usage
        assert answer.usage.prompt_tokens == n_tokens


def test_a_raw_text_has_the_special_tokens_that_its_tokenizer_gives_it(llama_like: Path) -> None:
    """A14: a BOS token is added, and the tokens of fill-in-the-middle are recognised, as transformers does."""
    tokenizer = AutoTokenizer.from_pretrained(llama_like)
    model = Qwen2ForCausalLM.from_pretrained(llama_like).eval()
    with Engine(llama_like, sequence_length=256) as engine:
        for text in (FRANCE, PREFIX, "", "é\u0301 <|im_start|>"):
            ids = tokenizer(text).input_ids
            assert ids[0] == 256
            with serving(engine) as server:
                answer = server.client.completions.create(model="llama-like", prompt=text, max_tokens=12, temperature=0)
            assert answer.usage
            assert answer.usage.prompt_tokens == len(ids)
            assert answer.choices[0].text == theirs(model, tokenizer, ids, 12)
    assert tokenizer(PREFIX).input_ids[1] == tokenizer.convert_tokens_to_ids("<|fim_prefix|>")


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([5, 999], "prompt[1]"),
        ([5, -1], "prompt[1]"),
        ([[5], [6, 272]], "prompt[1][1]"),
        ([5, 262], "prompt"),
        ("a <|image_pad|> b", "prompt"),
        ([5, True], "prompt[1]"),
        ([5, 1.5], "prompt[1]"),
        ([5, "a"], "prompt[1]"),
        (["a", 5], "prompt[1]"),
        ([["a"]], "prompt[0][0]"),
        ([[]], "prompt[0]"),
        ([], "prompt"),
        ("", "prompt"),
        (["a", ""], "prompt"),
        ([[1]] * 65, "prompt"),
        ([7] * 512, "prompt"),
        ("\ud800", "prompt"),
        (["a", "\ud800"], "prompt[1]"),
        (None, "prompt"),
        (7, "prompt"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_prompt_that_is_none_is_refused_by_its_place(tiny: RealServer, prompt: Any, field: str) -> None:
    """C7: an id beyond the vocabulary, a placeholder of media, and what is no prompt at all."""
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 2})
    answer = tiny.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_a_plain_prompt_of_the_guide_is_still_one_user_message(tiny: RealServer) -> None:
    """A14: /generate keeps the chat template; only OpenAI's completions continue a text."""
    asked = {"max_tokens": 12, "temperature": 0}
    chat = tiny.post("/generate/multimodal", json={"messages": [{"role": "user", "content": FRANCE}], **asked})
    assert tiny.post("/generate", json={"prompt": FRANCE, **asked}).json() == chat.json()
    raw = tiny.engine.chat(RawText(FRANCE), SamplingParams(max_tokens=12, temperature=0))
    assert raw.text != chat.json()["samples"][0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"top_p": 0.0}),
        ({"min_p": 0, "temperature": 0}, {"min_p": 0.0, "temperature": 0.0}),
        ({"stop": ""}, {}),
        ({"stop": []}, {}),
        ({"stop": ["", "x"]}, {"stop": ("x",)}),
        ({"max_tokens": 4.0}, {"max_tokens": 4}),
        ({"max_tokens": -1}, {}),
        ({"max_completion_tokens": -1, "max_tokens": 4}, {}),
        ({"max_completion_tokens": 5.0, "max_tokens": 4}, {"max_tokens": 5}),
        ({"seed": 1.0}, {"seed": 1}),
        ({"seed": -1}, {}),
        ({"seed": -7}, {"seed": -7}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"n": 2.0, "top_k": 5.0, "min_tokens": 0.0}, {"n": 2, "top_k": 5}),
        ({"stop_token_ids": [5.0], "logit_bias": {"7": -3}}, {"stop_token_ids": (5,), "logit_bias": {7: -3.0}}),
        ({"logprobs": True, "top_logprobs": 2.0}, {"top_logprobs": 2}),
        (dict.fromkeys(SamplingParams.model_fields), {}),
        (dict.fromkeys(("stream", "min_pixels", "max_pixels", "logprobs", "max_completion_tokens")), {}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_clients_send_mean_what_they_mean_elsewhere(
    lenient: FakeServer, fields: Any, expected: Any
) -> None:
    """C18, C6: -1, 0 and empty values, whole numbers as floats, null for the default."""
    answer = lenient.post("/v1/chat/completions", json={**CHAT, **fields})
    assert answer.status_code == 200
    assert lenient.engine.calls[-1].params == SamplingParams(**expected)


@pytest.mark.parametrize(
    "name", [name for name in SamplingParams.model_fields if name not in ("stop", "stop_token_ids", "logit_bias")]
)
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_numbers_are_no_texts_and_no_booleans(lenient: FakeServer, name: str, path: str) -> None:
    """C18: `"4"`, and true or 1 in each other's place."""
    flag = name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
    valid: dict[str, Any] = {"prompt": "x"} if path == "/generate" else {**CHAT, "logprobs": True}
    field = "n_samples" if (path, name) == ("/generate", "n") else name
    for wrong in ("1", 1 if flag else True, [1]):
        answer = lenient.post(path, json={**valid, field: wrong})
        assert answer.status_code == 400
        assert field in answer.text


def test_a_top_p_of_0_takes_the_likeliest_tokens(tiny: RealServer) -> None:
    """C18."""
    ask = {"model": "tiny", "prompt": FRANCE, "max_tokens": 12}
    greedy = tiny.post("/v1/completions", json={**ask, "temperature": 0}).json()["choices"][0]["text"]
    drawn = tiny.post("/v1/completions", json={**ask, "temperature": 2.0, "top_p": 0, "seed": 3}).json()
    assert drawn["choices"][0]["text"] == greedy


SENT_BY_CLIENTS: dict[str, Any] = {
    "options": {"num_ctx": 4096},
    "keep_alive": "5m",
    "session_id": "abc",
    "guided_json": None,
    "repeat_penalty": 1.1,
    "stream_options": {"include_usage": True, "continuous_usage_stats": False},
    "messages": [
        {"role": "user", "content": "Hello", "id": "m1"},
        {"role": "assistant", "content": "Hi", "id": "m2", "reasoning_content": "Hm.", "refusal": None}
        | {"annotations": [], "audio": None, "tool_calls": [], "function_call": None, "name": "it"},
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
    ],
}
IGNORED = [
    "keep_alive",
    "messages[].content[].cache_control",
    "messages[].id",
    "options",
    "repeat_penalty",
    "session_id",
]


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_ignored_and_listed(lenient: FakeServer, stream: bool) -> None:
    """C23: with the official client."""
    sent = {**SENT_BY_CLIENTS, "stream": stream}
    extra = {name: value for name, value in sent.items() if name not in ("messages", "stream", "stream_options")}
    with lenient.client as client:
        answer = client.chat.completions.with_raw_response.create(
            model="fake",
            messages=sent["messages"],
            stream=stream,
            extra_body=extra | {"stream_options": sent["stream_options"]},
        )
        answer.http_response.read()
    assert answer.status_code == 200
    assert sorted(answer.headers["x-mdi-ignored"].split(", ")) == IGNORED


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"keep_alive": "5m"}, "keep_alive"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": [{"role": "user", "content": "x", "id": "m"}]}, "messages[0].id"),
        (with_part({"type": "text", "text": "x", "cache_control": {}}), "messages[0].content[0].cache_control"),
        (with_part({"type": "image_url", "image_url": {"url": "a", "z": 2}}), "messages[0].content[0].image_url.z"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_strict_server_refuses_unknown_fields_by_name(
    lenient: FakeServer, strict: FakeServer, change: Any, field: str
) -> None:
    """C23: --strict-requests."""
    assert lenient.post("/v1/chat/completions", json={**CHAT, **change}).status_code == 200
    answer = strict.post("/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert "--strict-requests" in answer.json()["error"]["message"]
    assert strict.post("/v1/chat/completions", json={**CHAT, "user": "me", "tools": []}).status_code == 200


def test_unknown_fields_fill_neither_the_log_nor_the_header(
    lenient: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """C23: names of strangers, many and long and in any letters."""
    names = [f"x{number}" * 99 for number in range(500)] + ["a\nb", "é", "%", ""]
    body = json.dumps({**CHAT, **dict.fromkeys(names, 1)})
    for _ in range(3):
        answer = lenient.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200
        assert len(answer.headers["x-mdi-ignored"]) < 8000
    assert len(caplog.records) <= 100
    assert max(len(record.getMessage()) for record in caplog.records) < 500


@pytest.mark.parametrize("name", ["", " ", ",", "\r\nx: y", "é\u2028", "\x00", "%"])
def test_a_header_lists_any_name(lenient: FakeServer, name: str) -> None:
    """C23: also where it is the last of several, and where a header could not hold it."""
    for fields, n_names in (({name: 1}, 1), ({"other": None, name: None}, 2)):
        answer = lenient.post("/v1/chat/completions", json=CHAT | fields)
        assert answer.status_code == 200
        assert len(answer.headers["x-mdi-ignored"].split(", ")) == n_names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction", {"type": "content", "content": "x"}),
        ("bad_words", ["x"]),
        ("truncate_prompt_tokens", 5),
    ],
)
def test_fields_with_an_effect_are_refused_with_the_remedy(lenient: FakeServer, field: str, value: Any) -> None:
    """C23: what would change the answer is not ignored."""
    for path, valid in (("chat/completions", CHAT), ("completions", {"model": "fake", "prompt": "x"})):
        answer = lenient.post(f"/v1/{path}", json={**valid, field: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert "leave it out" in answer.json()["error"]["message"]
        assert lenient.post(f"/v1/{path}", json={**valid, field: None}).status_code == 200


SEPARATORS = "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\nb"


def test_every_event_and_answer_is_one_line_for_every_reader(lenient: FakeServer) -> None:
    """C15: a client that splits lines as Python's `str.splitlines` does, such as httpx's `iter_lines`."""
    prompt = {"model": "fake", "prompt": SEPARATORS}
    for path, valid in (("/v1/completions", prompt), ("/generate", {"prompt": SEPARATORS})):
        whole = lenient.post(path, json=valid).content.decode()
        assert len(whole.splitlines()) == 1
        lines = lenient.post(path, json={**valid, "stream": True}).content.decode().splitlines()
        assert {line[:6] for line in lines if line} == {"data: "}
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
        texts = [event["text"] if path == "/generate" else event["choices"][0]["text"] for event in events]
        assert "".join(texts) == SEPARATORS + " #0"


def test_the_name_a_server_was_started_with_names_its_model(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C13: as typed, with a path or an owner; one name is listed."""
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "small").symlink_to(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "acme" / "small")
    for typed, listed, others in (
        ("acme/small", "small", ["acme/small", "tiny"]),
        ("acme/small/", "small", ["acme/small/", "acme/small"]),
        (absolute, "small", [absolute]),
    ):
        with Engine(typed, sequence_length=64) as engine, serving(engine) as server, server.client as client:
            assert [model.id for model in client.models.list()] == [listed]
            for name in (listed, *others):
                assert client.models.retrieve(name).id == name
                assert server.get(f"/v1/models/{name}").json()["id"] == name
                answer = client.completions.create(model=name, prompt="x", max_tokens=1)
                assert answer.model == listed
            refused = server.post("/v1/completions", json={"model": "acme", "prompt": "x"})
            assert refused.status_code == 404
            assert str(tmp_path) not in refused.text
