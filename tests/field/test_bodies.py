"""Bodies of requests: what a small text could make of memory and time, and how large a film may be."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.fakes import HOLD, FakeEngine, piece

from mdi.core.config import MEBIBYTE, GatewayConfig
from mdi.core.errors import InputError
from mdi.gateway import json_body
from mdi.gateway.json_body import read_json
from mdi.gateway.middleware import body_limit
from tests.gateway.conftest import FakeServer, serving

JSON = {"Content-Type": "application/json"}


def read(text: bytes) -> Any:
    return asyncio.run(read_json(text, "the body"))


@pytest.fixture
def server(lenient: FakeServer) -> FakeServer:
    lenient.engine.reset()
    return lenient


@pytest.mark.parametrize(
    ("path", "objects"),
    [
        ("/v1/chat/completions", 6_000_000),
        ("/v1/completions", 60_000),
        ("/generate", 60_000),
        ("/generate/multimodal", 60_000),
    ],
)
def test_many_objects_are_refused_unparsed(server: FakeServer, path: str, objects: int) -> None:
    """B4: millions would take seconds and hundreds of megabytes."""
    body = b'{"model": "fake", "messages": [' + b"{}," * objects + b"{}]}"
    answer = server.post(path, content=body, headers=JSON)
    assert answer.status_code == 400
    assert "the body has more than" in answer.text


def test_a_form_field_has_the_same_limits(server: FakeServer) -> None:
    """B4."""
    fields = {"messages": b"[" + b"{}," * 600_000 + b"{}]", "max_tokens": b"4"}
    answer = server.post("/generate/multimodal", files={name: (None, text) for name, text in fields.items()})
    assert answer.status_code == 400
    assert "the form field messages has more than" in answer.text


@pytest.mark.parametrize(
    ("text", "excess"),
    [
        (b"[" + b"[]," * 30_000 + b"1]", "lists"),
        (b"[" * 100_000, "lists"),
        (b"[" + b"1," * 400_000 + b"1]", "values"),
        (b'{"a":1' + b',"a":1' * 40_000 + b"}", "keys"),
        (b"[" + b'"",' * 150_000 + b'""]', "strings"),
        (b"[" + b'"data:",' * 8_000_000 + b'""]', "strings"),
        (b'["' + b"\\n" * 3_000_000 + b'"]', "escaped"),
        (b'["data:' + b"\\\\" * 2_000_000 + b'"]', "escaped"),
        (b'["' + b"x" * (9 * MEBIBYTE) + b'"]', "text"),
        (b"[" + b" " * (3 * MEBIBYTE) + b"]", "outside of strings"),
        (b"[" + b"9" * (3 * MEBIBYTE) + b"]", "outside of strings"),
        (b'["\\\\","' + b"\\\\" * 9 + b'",' + b"[]," * 30_000 + b'"\\""]', "lists"),
        (b'["\\"",' + b"{}," * 30_000 + b'"\\""]', "objects"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else value,
)
def test_what_would_take_long_to_parse_is_refused(text: bytes, excess: str) -> None:
    """B4: brothers of the many objects."""
    with pytest.raises(InputError, match=excess):
        read(text)


@pytest.mark.parametrize(
    "text",
    [b"[" + b"9" * 5000 + b"]", b"[" * 9_999, b'{"a":' * 9_999, b"\xff" * 100_000, b"[" + b'"' * 100_001],
    ids=["digits", "lists", "objects", "no UTF-8", "open string"],
)
def test_what_cannot_be_parsed_is_an_error_of_the_request(text: bytes) -> None:
    """B4: nesting, long numbers and what is no JSON."""
    with pytest.raises(InputError, match="not valid JSON"):
        read(text)


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": [151643] * 131_072},
        {"messages": [{"role": "user", "content": str(number)} for number in range(3_000)]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 5_000}]},
        {"prompt": '{"a": [1, 2, "\\u1234"]}, ' * 40_000},
        {"prompt": "中文" * 100_000},
        {"url": "data:video/mp4;base64," + "A" * (10 * MEBIBYTE)},
        {"url": "data:video/mp4;base64," + ("A" * 63 + "/") * (MEBIBYTE // 4)},
    ],
    ids=["token ids", "messages", "parts", "JSON as text", "escaped text", "video", "slashes"],
)
def test_large_requests_of_real_clients_are_read(content: Any) -> None:
    """B4: long prompts, long chats and files in data: URLs, escaped or not."""
    text = json.dumps(content)
    assert read(text.encode()) == content
    if "url" in content:
        assert read(text.replace("/", "\\/").encode()) == content


LONG = "data:image/png;base64," + "A" * 100_000


@pytest.mark.parametrize(
    "content",
    [
        {"url": LONG, "more": [LONG + "B", {"url": LONG}, "data:,x"]},
        LONG,
        [LONG, f'"{LONG}', f"{LONG}\n", f"{LONG}\\", f"{LONG}é", f'x"{LONG}" y', f'\\"{LONG}'],
        {LONG: LONG, "a": {f"{LONG}b": [[LONG]]}},
    ],
    ids=["values", "alone", "escapes", "keys"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_files_are_read_as_the_parser_reads_them(content: Any, indent: int | None) -> None:
    assert read(json.dumps(content, indent=indent).encode()) == content
    assert read(json.dumps(content, indent=indent, ensure_ascii=False).encode()) == content


@pytest.mark.parametrize(
    "text",
    [
        f'{{"url": "{LONG}',
        f'{{"url": "x"{LONG}"}}',
        f'["{LONG}" "{LONG}"]',
        f'["{LONG}\n"]',
        f'["{LONG}\0"]',
        f'{{"{LONG}"}}',
    ],
    ids=["open", "two strings", "no comma", "control character", "zero", "no value"],
)
def test_files_in_what_is_no_json_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="not valid JSON"):
        read(text.encode())


texts = st.text(st.sampled_from('ab"\\{[,:é\n'), max_size=6)
values = st.recursive(
    st.one_of(texts, st.integers(), st.none(), st.booleans()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)


def strings_in(value: Any) -> int:
    match value:
        case str():
            return 1
        case list():
            return sum(map(strings_in, value))
        case dict():
            return len(value) + sum(map(strings_in, value.values()))
    return 0


@settings(max_examples=25)
@given(st.lists(values, min_size=1))
def test_strings_and_structure_are_told_apart(value: Any) -> None:
    """B4: whatever stands in the strings."""
    text = json.dumps(value).encode()
    lists = json.dumps(value, ensure_ascii=False).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "MAX_STRINGS", strings_in(value))
        patch.setattr(json_body, "MAX_COUNTS", {b"{": objects_in(value), b":": 10**9, b",": 10**9})
        assert json_body._excess(text) is json_body._excess(lists) is None
        if strings_in(value):
            patch.setattr(json_body, "MAX_STRINGS", strings_in(value) - 1)
            assert "strings" in (json_body._excess(text) or "")
            patch.setattr(json_body, "MAX_STRINGS", strings_in(value))
        if objects_in(value):
            patch.setattr(json_body, "MAX_COUNTS", {b"{": objects_in(value) - 1, b":": 10**9, b",": 10**9})
            assert "objects" in (json_body._excess(text) or "")


def objects_in(value: Any) -> int:
    match value:
        case list():
            return sum(map(objects_in, value))
        case dict():
            return 1 + sum(map(objects_in, value.values()))
    return 0


def test_large_bodies_are_parsed_beside_the_event_loop(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4: streams go on meanwhile."""
    parsed = list[tuple[int, threading.Thread]]()

    def loads(text: bytes) -> Any:
        parsed.append((len(text), threading.current_thread()))
        return json.JSONDecoder().decode(text.decode())

    monkeypatch.setattr("mdi.gateway.json_body.json.loads", loads)
    for length in (10, 10**6):
        assert server.post("/generate", json={"prompt": "x" * length}).status_code == 200
    (_, loop), (length, beside) = parsed
    assert length > 10**6
    assert beside is not loop


def test_bodies_of_running_requests_are_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """B4: many large bodies do not fill the memory; room is free again when a request has ended."""
    monkeypatch.setattr(body_limit, "MAX_HELD_BYTES", 3 * MEBIBYTE)
    config = GatewayConfig(max_body_bytes=2 * MEBIBYTE, max_upload_bytes=2 * MEBIBYTE)
    with serving(FakeEngine(), config) as server, ThreadPoolExecutor() as pool:
        server.engine.says(HOLD, piece("done", "stop"))
        large = {"prompt": "x" * (MEBIBYTE * 9 // 5)}
        first = pool.submit(server.post, "/generate", json=large)
        assert server.engine.submitted.wait(20)
        refused = server.post("/generate", json=large)
        assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
        server.engine.requests[0].resume()
        assert first.result().status_code == 200
        server.engine.says(piece("done", "stop"))
        for _ in range(3):
            assert server.post("/generate", json=large).status_code == 200


@pytest.mark.slow
def test_a_film_of_100_megabytes_is_accepted_as_a_form(server: FakeServer) -> None:
    """C17."""
    film = bytes(100 * 10**6)
    answer = server.post("/generate/multimodal", data={"prompt": "?"}, files={"video": ("film.mp4", film, "video/mp4")})
    assert answer.status_code == 200
    assert server.engine.part(0).source == film


def test_what_is_too_large_names_the_limit_and_the_option() -> None:
    """C17: each kind of body has its own."""
    config = GatewayConfig(max_body_bytes=MEBIBYTE, max_upload_bytes=2 * MEBIBYTE)
    with serving(FakeEngine(), config) as server:
        answer = server.post("/generate", json={"prompt": "x" * MEBIBYTE})
        assert answer.status_code == 413
        assert "larger than 1 MiB: start the server with a higher --max-body-mb" in answer.text
        for size, status in ((MEBIBYTE, 200), (2 * MEBIBYTE, 413)):
            answer = server.post("/generate/multimodal", data={"prompt": "?"}, files={"image": bytes(size)})
            assert answer.status_code == status
        assert "larger than 2 MiB: start the server with a higher --max-upload-mb" in answer.text


@pytest.mark.parametrize(
    "part",
    [
        b'Content-Disposition: form-data; name="a"\r\n\r\nx',
        b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\nx',
    ],
    ids=["fields", "files"],
)
def test_a_form_of_many_parts_is_refused(server: FakeServer, part: bytes) -> None:
    """B4: as are parts with many or long headers."""
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    body = (b"--b\r\n" + part + b"\r\n") * 5_000 + b"--b--\r\n"
    answer = server.post("/generate/multimodal", content=body, headers=headers)
    assert answer.status_code == 400
    assert "Too many" in answer.text


@pytest.mark.parametrize("head", [b"X: " + b"x" * 10**7, b"X: x\r\n" * 10**6], ids=["long", "many"])
def test_a_part_with_a_large_head_is_refused(server: FakeServer, head: bytes) -> None:
    """B4."""
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = server.post("/generate/multimodal", content=b"--b\r\n" + head + b"\r\n\r\nx\r\n--b--\r\n", headers=headers)
    assert answer.status_code == 400


def test_an_error_does_not_send_everything_back(server: FakeServer) -> None:
    """B4: a text that is quoted in an error is cut."""
    for body in ({"prompt": "x", "y" * MEBIBYTE: 1}, {"prompt": "x", "temperature": "y" * MEBIBYTE}):
        answer = server.post("/generate", json=body)
        assert answer.status_code == 400
        assert len(answer.content) < 10_000
    chat = {"model": "fake", "messages": [{"role": "y" * MEBIBYTE, "content": "x"}]}
    assert len(server.post("/v1/chat/completions", json=chat).content) < 10_000
