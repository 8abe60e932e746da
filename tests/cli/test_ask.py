"""What `mdi ask` prints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mdi import Engine, SamplingParams
from mdi.cli.ask import _print_answers


def test_an_answer_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Tabs of code stay tabs, long lines stay whole, brackets are no markup."""
    pieces = ["if x:\n\treturn [bold]", "a" * 300, "\x0c :smile:"]

    def stream(*_: Any) -> Any:
        return (SimpleNamespace(text=text) for text in pieces)

    _print_answers(cast(Engine, SimpleNamespace(stream=stream)), [], SamplingParams())
    assert capsys.readouterr().out == "".join(pieces) + "\n"
