"""What many rooms' tests share: a tiny checkpoint, a photograph, and a check that no node process is left behind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from skimage import data
from testing.checkpoints import tiny_config
from testing.processes import node_processes

from mdi.checkpoint.random_weights import write_random_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL of six layers with random weights, byte-level tokenizer and chat template."""
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_config())


@pytest.fixture(scope="session")
def photograph() -> bytes:
    """A real photograph, 224 x 168 pixels, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(data.coffee()).resize((224, 168)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def no_process_left() -> Iterator[None]:
    yield
    assert node_processes() == []
