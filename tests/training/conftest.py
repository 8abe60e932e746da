"""A checkpoint as training writes it, untrained: all but the numbers is as in the bundled one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from training.corpus import corpus, json_corpus
from training.export import export
from training.model import Student
from training.samples import BatchMaker
from training.tokens import ChatTokens, train_tokenizer, with_json


@pytest.fixture(scope="session")
def student() -> Student:
    torch.manual_seed(0)
    return Student().eval()


@pytest.fixture(scope="session")
def plain_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the tokens for JSON."""
    path = tmp_path_factory.mktemp("tokenizer") / "plain.json"
    train_tokenizer(corpus()).save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer_file(plain_tokenizer_file: Path) -> Path:
    path = plain_tokenizer_file.with_name("tokenizer.json")
    with_json(Tokenizer.from_file(str(plain_tokenizer_file)), json_corpus()).save(str(path))
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
