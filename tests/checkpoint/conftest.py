"""Small random checkpoints on disk, written once per session. Tests that change one copy it first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from testing.checkpoints import tiny_config, tiny_text_config

from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import Source, open_source


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL, 6 layers, tied, one file, float32."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", tiny_config())


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL, 5 layers, untied, three files, float32."""
    config = tiny_config(num_hidden_layers=5, tie_word_embeddings=False)
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "sharded", config, shards=3)


@pytest.fixture(scope="session")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2, 6 layers, tied."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "text", tiny_text_config())


@pytest.fixture
def own_copy(tiny: Path, tmp_path: Path) -> Path:
    """`tiny`, for the test alone to change."""
    return Path(shutil.copytree(tiny, tmp_path / "copy", ignore=shutil.ignore_patterns("chunks")))


@pytest.fixture
def source(own_copy: Path) -> Source:
    return open_source(own_copy)
