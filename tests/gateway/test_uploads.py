"""Files sent in forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mdi.core.sampling import SamplingParams
from tests.gateway.conftest import FakeServer, RealServer, data_url, image_chat, video_chat


def images(*names: Any) -> str:
    parts = [{"type": "image"} | ({} if name is None else {"image": name}) for name in names]
    return json.dumps([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("names", "placed"),
    [
        ((None, None), [b"A", b"B"]),
        (("b.png", "a.png"), [b"B", b"A"]),
        (("a.png", None), [b"A", b"B"]),
        ((None, "a.png"), [b"B", b"A"]),
        (("a.png", "", "a.png"), [b"A", b"B", b"A"]),
        ((None, "https://example.org/c.png", None), [b"A", "https://example.org/c.png", b"B"]),
    ],
)
def test_uploads_go_where_the_messages_want_them(server: FakeServer, names: Any, placed: list[Any]) -> None:
    files = [("images", ("a.png", b"A")), ("file", ("b.png", b"B"))]
    answer = server.post("/generate/multimodal", files=files, data={"messages": images(*names)})
    assert answer.status_code == 200
    assert [server.engine.part(number).source for number in range(len(placed))] == placed


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (images("a.png", None), "several uploaded files have that name"),
        (images(None), "messages place 1"),
        (images(None, None, None), "more image parts"),
        (images(["a.png"]), "messages place 0"),
        ('{"a": 1}', "messages"),
        ("[" * 50_000, "not valid JSON"),
    ],
)
def test_uploads_without_one_clear_place_are_refused(server: FakeServer, messages: str, message: str) -> None:
    files = [("image", ("a.png", b"A")), ("image", ("a.png", b"B"))]
    answer = server.post("/generate/multimodal", files=files, data={"messages": messages})
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


@pytest.mark.parametrize(
    "file",
    [
        ("video", ("clip", b"V")),
        ("videos", ("clip.bin", b"V", "application/octet-stream")),
        ("file", ("clip", b"V", "video/mp4")),
        ("files", ("clip.webm", b"V", "application/octet-stream")),  # what curl makes of it
    ],
)
def test_uploaded_videos_are_distinguished_from_images(server: FakeServer, file: Any) -> None:
    files = [("file", ("a.png", b"A", "image/png")), file, ("file", ("b.gif", b"B", "image/gif"))]
    kinds = ("video", "image", "image")
    messages = json.dumps([{"role": "user", "content": [{"type": kind} for kind in kinds]}])
    for form in ({"messages": messages}, {"prompt": "What?"}):
        assert server.post("/generate/multimodal", files=files, data=form).status_code == 200
        parts = [server.engine.part(number) for number in range(3)]
        contents = [(part.kind, part.source) for part in parts]
        assert sorted(contents) == [("image", b"A"), ("image", b"B"), ("video", b"V")]
    assert [kind for kind, _ in contents] == ["image", "video", "image"]  # with a prompt, in the form's order


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "image"}], "1 video files were uploaded, but the messages place 0"),
        ([{"type": "video"}, {"type": "video"}], "more video parts than uploaded video files"),
        ([{"type": "video", "speed": 2}], "unknown field messages[0].content[0].speed"),
    ],
)
def test_uploaded_videos_without_one_clear_place_are_refused(server: FakeServer, parts: Any, message: str) -> None:
    form = {"messages": json.dumps([{"role": "user", "content": parts}])}
    files = [("file", ("a.png", b"A"))] * (parts[0]["type"] == "image") + [("video", ("v.mp4", b"V"))]
    answer = server.post("/generate/multimodal", files=files, data=form)
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


def test_a_forms_messages_may_hold_a_picture_of_many_megabytes(server: FakeServer) -> None:
    url = "data:image/png;base64," + "A" * (3 * 2**20)
    files = [("image", ("a.png", b"A"))]
    answer = server.post("/generate/multimodal", files=files, data={"messages": images(url, None)})
    assert answer.status_code == 200
    assert server.engine.part(0).source == url


def test_a_forms_settings_reach_the_engine(server: FakeServer) -> None:
    form = {"prompt": "[What?]", "n_samples": "2", "temperature": "0.5", "stop": '["a"]', "max_pixels": "300"}
    answer = server.post("/generate/multimodal", files={"file": ("a.png", b"A")}, data=form)
    assert answer.status_code == 200
    call = server.engine.calls[0]
    assert call.params == SamplingParams(n=2, temperature=0.5, stop=("a",))
    assert call.max_pixels == 300
    assert [server.engine.part(0).source, server.engine.part(1).text] == [b"A", "[What?]"]


def test_uploads_give_the_answer_of_the_same_picture_in_json(real: RealServer, picture: str, photograph: bytes) -> None:
    settings = {"max_tokens": 6, "temperature": 0}
    expected = real.post("/generate/multimodal", json={"messages": image_chat(picture), **settings}).json()
    file = {"image": ("cup.png", photograph, "image/png")}
    fields = {name: str(value) for name, value in settings.items()}
    forms = [
        {"prompt": "What is this?"},
        {"messages": json.dumps(image_chat(None))},
        {"messages": json.dumps(image_chat("cup.png"))},
    ]
    for form in forms:
        assert real.post("/generate/multimodal", files=file, data={**fields, **form}).json() == expected


def test_a_video_is_answered_alike_however_it_comes(real: RealServer, clip: bytes) -> None:
    settings = {"max_tokens": 6, "temperature": 0}
    request = {"messages": video_chat(data_url(clip)), **settings}
    expected = real.post("/generate/multimodal", json=request).json()
    file = {"file": ("clip.mp4", clip, "video/mp4")}
    fields = {name: str(value) for name, value in settings.items()}
    forms = [
        {"prompt": "What happens?"},
        {"messages": json.dumps(video_chat(None))},
        {"messages": json.dumps(video_chat("clip.mp4"))},
    ]
    for form in forms:
        assert real.post("/generate/multimodal", files=file, data={**fields, **form}).json() == expected
    part: Any = {"type": "video_url", "video_url": {"url": data_url(clip)}}
    messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}]
    answer = real.client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0)
    assert [answer.choices[0].message.content] == expected["samples"]


@pytest.mark.parametrize(
    ("form", "files", "message"),
    [
        ({"max_tokens": "4"}, 1, "messages"),
        ({"prompt": "x", "messages": "[]"}, 1, "not both"),
        ({"prompt": "x", "max_tokens": "four"}, 1, "max_tokens"),
        ({"messages": json.dumps([{"role": "user", "content": "no picture"}])}, 1, "1 image files"),
        ({"messages": json.dumps(image_chat(None))}, 0, "more image parts"),
    ],
)
def test_bad_forms_are_refused_with_the_cause(
    real: RealServer, photograph: bytes, form: dict[str, str], files: int, message: str
) -> None:
    uploads: list[Any] = [("image", ("a.png", photograph))] * files or [("padding", (None, "1"))]
    answer = real.post("/generate/multimodal", data=form, files=uploads)
    assert answer.status_code == 400
    assert message in answer.json()["detail"]
