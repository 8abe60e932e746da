"""/generate and /generate/multimodal."""

from __future__ import annotations

from typing import Any

import pytest
from testing.videos import sound

from mdi.core.messages import ImagePart
from mdi.core.sampling import SamplingParams
from tests.gateway.conftest import HELLO, FakeServer, RealServer, data_url, image_chat, video_chat


def test_every_setting_reaches_the_engine(server: FakeServer) -> None:
    settings = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.75, "top_k": 4, "min_p": 0.25, "seed": 3}
    server.post("/generate", json={"prompt": "x", "n_samples": 2, "stop": ["a", "b"], **settings})
    assert server.engine.calls[0].params == SamplingParams(n=2, stop=("a", "b"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n_samples": 0}, "n_samples"),
        ({"n_samples": True}, "n_samples"),
        ({"messages": [{"role": "user", "content": "x", "id": "y"}]}, "messages[0].id"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "font": 1}]}]}, "messages[0].content[0].font"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"surprise": 1}, "surprise"),
        ({"n": 2}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_a_refused_field_is_named(server: FakeServer, fields: dict[str, Any], field: str) -> None:
    answer = server.post("/generate/multimodal", json={"messages": HELLO, **fields})
    assert answer.status_code == 400
    assert answer.json()["field"] == field
    assert field in answer.json()["detail"]


def test_answers_are_lists_of_samples(real: RealServer, picture: str) -> None:
    text = real.post("/generate", json={"prompt": "Hi", "max_tokens": 5, "n_samples": 2, "temperature": 1.0, "seed": 1})
    assert len(text.json()["samples"]) == 2
    request = {"messages": image_chat(picture), "max_tokens": 5, "n_samples": 1, "temperature": 0}
    assert len(real.post("/generate/multimodal", json=request).json()["samples"]) == 1


def test_a_stream_has_the_text_of_the_whole_answer(real: RealServer) -> None:
    request = {"prompt": "Hi", "max_tokens": 5, "temperature": 0}
    whole = real.post("/generate", json=request).json()["samples"][0]
    *events, end = real.events("/generate", **request)
    assert end == "[DONE]"
    assert "".join(event["text"] for event in events) == whole


def test_a_prompt_that_is_too_long_is_refused_by_its_own_name(real: RealServer) -> None:
    answer = real.post("/generate", json={"prompt": "x" * 600})
    assert (answer.status_code, answer.json()["field"]) == (400, "prompt")


def test_a_list_of_frames_is_a_video(real: RealServer, picture: str) -> None:
    request = {"messages": video_chat([picture] * 3, max_pixels=20_000), "max_tokens": 4, "temperature": 0}
    assert len(real.post("/generate/multimodal", json=request).json()["samples"]) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,!!!!", "base64"),
        ("data:text/plain,hello", "image"),
        ("http://example.org/cat.png", "data: URL"),
        ("/etc/passwd", "data: URL"),
        ("file:///etc/passwd", "data: URL"),
        ("gopher://x/y", "gopher"),
    ],
)
def test_bad_pictures_are_refused_with_the_cause(real: RealServer, image: str, message: str) -> None:
    answer = real.post("/generate/multimodal", json={"messages": image_chat(image), "max_tokens": 4})
    assert answer.status_code == 400
    assert message in answer.json()["detail"]
    assert "/work" not in answer.text


@pytest.mark.parametrize(
    ("video", "settings", "field", "message"),
    [
        ("data:video/mp4;base64,!!!!", {}, "video", "base64"),
        ("data:video/mp4,hello", {}, "video", "known format"),
        (data_url(sound()), {}, "video", "no video"),
        ("http://example.org/cat.mp4", {}, "video", "data: URL"),
        ("/etc/passwd", {}, "video", "data: URL"),
        ([], {}, "messages[0].content[0].video", "video"),
        ([1], {}, "messages[0].content[0].video[0]", "image"),
        (["data:,x"], {"nframes": 2}, "messages[0].content[0].nframes", "list"),
        (["data:,x"], {"fps": 0}, "fps", "above 0"),
        (["data:,x"], {}, "video", "frame 0"),
        ({"url": "x"}, {}, "messages[0].content[0].video", "list of images"),
        (None, {}, "messages[0].content[0].video", "video"),
        ("CLIP", {"fps": 0}, "fps", "above 0"),
        ("CLIP", {"fps": "2"}, "messages[0].content[0].fps", "number"),
        ("CLIP", {"nframes": 3.5}, "messages[0].content[0].nframes", "whole number"),
        ("CLIP", {"nframes": 31}, "nframes", "only 30 frames"),
        ("CLIP", {"fps": 1, "nframes": 4}, "nframes", "not both"),
        ("CLIP", {"max_pixels": 10}, "max_pixels", "784"),
        ("CLIP", {"total_pixels": 0}, "total_pixels", "784"),
        ("CLIP", {"fps": 10}, "messages", "lower max_pixels, total_pixels, fps or nframes, or raise"),
        ("CLIP", {"speed": 2}, "messages[0].content[0].speed", "unknown"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_videos_are_refused_with_the_cause(
    real: RealServer, clip: bytes, video: Any, settings: Any, field: str, message: str
) -> None:
    request = {"messages": video_chat(data_url(clip) if video == "CLIP" else video, **settings), "max_tokens": 4}
    answer = real.post("/generate/multimodal", json=request)
    assert answer.status_code == 400
    assert answer.json()["field"] == field
    assert message in answer.json()["detail"]


def test_openais_parts_are_understood_here_as_well(server: FakeServer) -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}, "max_pixels": 9}
    answer = server.post("/generate/multimodal", json={"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 200
    assert server.engine.part(0) == ImagePart("https://example.org/a.png", max_pixels=9)
