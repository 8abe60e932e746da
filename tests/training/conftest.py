"""A checkpoint as training writes it, untrained: all but the numbers is as in the bundled one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.corpus import corpus
from training.export import export
from training.model import Student
from training.samples import BatchMaker
from training.tokens import ChatTokens, train_tokenizer


@pytest.fixture(scope="session")
def student() -> Student:
    torch.manual_seed(0)
    return Student().eval()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(corpus()).save(str(path))
    return path


@pytest.fixture(scope="session")
def untrained(student: Student, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    export(student, tokenizer_file, folder)
    return folder


@pytest.fixture(scope="session")
def tokens(tokenizer_file: Path) -> ChatTokens:
    return ChatTokens(tokenizer_file)


@pytest.fixture(scope="session")
def maker(tokens: ChatTokens) -> BatchMaker:
    return BatchMaker(tokens, patches_per_batch=256)
