"""Values of options in the forms of `vllm serve`."""

from __future__ import annotations

import pytest

from mdi.cli.values import limits_of_kinds, tokens, words
from mdi.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("4k", 4000), ("4K", 4096), ("25.6k", 25_600), ("1M", 2**20), (" 1m ", 10**6)]
)
def test_a_number_of_tokens_may_have_a_unit(text: str, number: int) -> None:
    """The examples of vLLM's documentation of --max-model-len."""
    assert tokens(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "4.5", "4 k", "1e3", "0x10", "1.0001k", "٤"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="4096, 4k"):
        tokens(text)


@pytest.mark.parametrize("text", ["image=2,video=1", '{"image": 2, "video": 1}', " image = 2 , video = 1"])
def test_limits_of_media_have_two_forms(text: str) -> None:
    assert limits_of_kinds(text, "--x") == {"image": 2, "video": 1}


@pytest.mark.parametrize(
    "text",
    ["", "2", "image", "image=", "image=2=3", "audio=1", "{", "{}", '{"image": null}', '{"image": 1e999}', "[2]"],
)
def test_what_limits_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--x is like image=2,video=1"):
        limits_of_kinds(text, "--x")


def test_words_come_alone_or_in_lists() -> None:
    assert words(None, "--x") == ()
    assert words(["a", '["b", "c"]', "d"], "--x") == ("a", "b", "c", "d")
    for broken in ("[a]", "[1]", '["a"'):
        with pytest.raises(ConfigError, match="--x takes words"):
            words([broken], "--x")
