"""Tokenizers whose templates write tools as four families do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from testing.small_tokenizers import byte_level_tokenizer, write_tokenizer
from testing.tool_templates import MARKS
from tokenizers import Tokenizer as Backend

from mdi.prompt.tokenizer import Tokenizer

MakeTokenizer = Callable[[str], tuple[Tokenizer, Path]]


@pytest.fixture(scope="session")
def tokenizer_with(tmp_path_factory: pytest.TempPathFactory) -> MakeTokenizer:
    """Makes a byte-level tokenizer with a template, and its folder; each is made once."""
    known: dict[str, tuple[Tokenizer, Path]] = {}

    def make(template: str) -> tuple[Tokenizer, Path]:
        if template not in known:
            backend = Backend.from_str(byte_level_tokenizer().to_str())
            backend.add_special_tokens(list(MARKS))
            path = write_tokenizer(tmp_path_factory.mktemp("tools"), backend, template)
            known[template] = Tokenizer(path), path
        return known[template]

    return make
