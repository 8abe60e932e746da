from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdi.core import unknown_fields
from mdi.core.errors import InputError, MediaError
from mdi.core.messages import ImagePart, Message, TextPart, VideoPart, parse_messages

SURROGATE_URL = {"type": "image", "image": "http://a/\ud800"}


def parsed(*parts: Any) -> Any:
    """The parts of one message."""
    [message] = parse_messages([{"role": "user", "content": list(parts)}])
    return message.content


def test_messages_in_the_chat_form_are_typed() -> None:
    given = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": b"PNG"}]},
        {"role": "assistant", "content": "b"},
    ]
    expected = (
        Message("system", "Be brief."),
        Message("user", (TextPart("a"), ImagePart(b"PNG"))),
        Message("assistant", "b"),
    )
    assert parse_messages(given) == expected
    assert [message.media for message in expected] == [[], [ImagePart(b"PNG")], []]


@pytest.mark.parametrize("source", ["cup.png", "https://example.org/a", b"bytes", Path("cup.png")])
def test_images_and_videos_come_from_paths_urls_and_bytes_with_their_settings(source: Any) -> None:
    pixels = {"min_pixels": 1, "max_pixels": 2}
    assert parsed({"type": "image", "image": source, **pixels}) == (ImagePart(source, **pixels),)
    settings: Any = {"fps": 1, "nframes": None, "total_pixels": 3, **pixels}
    assert parsed({"type": "video", "video": source, **settings}) == (VideoPart(source, **settings),)


def test_a_list_of_images_is_a_video() -> None:
    assert parsed({"type": "video", "video": [b"1", "2.png"]}) == (VideoPart((b"1", "2.png")),)


def test_openais_names_mean_the_same() -> None:
    url = "https://example.org/a"
    for given in (url, {"url": url, "detail": "low"}):
        assert parsed({"type": "image_url", "image_url": given, "max_pixels": 9}) == (ImagePart(url, max_pixels=9),)
        assert parsed({"type": "video_url", "video_url": given, "fps": 1.5}) == (VideoPart(url, fps=1.5),)
    assert parse_messages([{"role": "developer", "content": "x"}]) == (Message("system", "x"),)


def test_typed_messages_and_parts_stay_as_they_are() -> None:
    messages = (Message("user", (TextPart("a"), VideoPart("a.mp4"))),)
    assert parse_messages(messages)[0] is messages[0]
    assert parsed(ImagePart("a.png"), {"type": "text", "text": "b"}) == (ImagePart("a.png"), TextPart("b"))


def test_large_media_are_not_copied() -> None:
    url, data = "data:image/png;base64," + "A" * 10**6, b"\0" * 10**6
    first, second = parsed({"type": "image", "image": url}, {"type": "video", "video": data})
    assert first.source is url
    assert second.source is data


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (None, "messages"),
        (["x"], "messages[0]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": "pilot", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": "a\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": [ImagePart("a"), SURROGATE_URL]}], "messages[0].content[1].image"),
    ],
)
def test_malformed_messages_are_refused_by_name(messages: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_messages(messages)
    assert caught.value.field == field
    assert field in str(caught.value) or "role" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("x", "messages[0].content[0]"),
        ({"type": "smell"}, "messages[0].content[0]"),
        ({"type": ["text"]}, "messages[0].content[0]"),
        ({"type": "text"}, "messages[0].content[0].text"),
        ({"type": "text", "text": 1}, "messages[0].content[0].text"),
        ({"type": "text", "text": "\udfff"}, "messages[0].content[0].text"),
        ({"type": "image", "image": {"url": "x"}}, "messages[0].content[0].image"),
        ({"type": "image", "image": "a", "max_pixels": "9"}, "messages[0].content[0].max_pixels"),
        ({"type": "image_url", "image_url": {}}, "messages[0].content[0].image_url"),
        ({"type": "video_url", "video_url": 7}, "messages[0].content[0].video_url"),
        ({"type": "video"}, "messages[0].content[0].video"),
        ({"type": "video", "video": ""}, "messages[0].content[0].video"),
        ({"type": "video", "video": []}, "messages[0].content[0].video"),
        ({"type": "video", "video": 7}, "messages[0].content[0].video"),
        ({"type": "video", "video": ["a.png", None]}, "messages[0].content[0].video[1]"),
        ({"type": "video", "video": ["a.png"], "nframes": 2}, "messages[0].content[0].nframes"),
        ({"type": "video", "video": "a", "nframes": 3.5}, "messages[0].content[0].nframes"),
        ({"type": "video", "video": "a", "fps": True}, "messages[0].content[0].fps"),
    ],
)
def test_malformed_parts_are_refused_by_name(part: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(part)
    assert caught.value.field == field
    assert isinstance(caught.value, MediaError) == field.endswith(("image", "_url", "video", "video[1]"))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "user", "content": "x", "id": "y"}, "messages[0].id"),
        ({"role": "user", "content": [{"type": "text", "font": 1}]}, "messages[0].content[0].font"),
        ({"role": "user", "content": [{"type": "image", "image": "a", "fps": 1}]}, "messages[0].content[0].fps"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "a", "image": 1}]},
            "messages[0].content[0].image",
        ),
    ],
)
def test_unknown_fields_are_refused_where_that_is_asked_for(message: Any, field: str) -> None:
    with pytest.raises(InputError, match="unknown field") as caught:
        parse_messages([message], unknown_fields.refuse)
    assert caught.value.field == field


def test_unknown_fields_are_ignored_otherwise() -> None:
    part = {"type": "text", "text": "x", "cache_control": {}}
    assert parse_messages([{"role": "user", "content": [part], "id": "y"}]) == (Message("user", (TextPart("x"),)),)
