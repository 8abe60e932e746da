from __future__ import annotations

from pathlib import Path

import pytest
from training.samples import BatchMaker
from training.tokens import ChatTokens

from mdi.checkpoint.source import ASSETS, BUNDLED


@pytest.fixture(scope="session")
def tokenizer_file() -> Path:
    return ASSETS / BUNDLED / "tokenizer.json"


@pytest.fixture(scope="session")
def tokens(tokenizer_file: Path) -> ChatTokens:
    return ChatTokens(tokenizer_file)


@pytest.fixture(scope="session")
def maker(tokens: ChatTokens) -> BatchMaker:
    return BatchMaker(tokens, patches_per_batch=256)
