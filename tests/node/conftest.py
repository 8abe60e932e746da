"""Chunks of a plan with three nodes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source


@pytest.fixture(scope="session")
def chunks(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Chunks of a three-node plan, in pipeline order."""
    path = tmp_path_factory.mktemp("nodes") / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    folder = prepare(open_source(path), 3)
    return [folder / chunk.file for chunk in Manifest.read(folder).chunks]


@pytest.fixture(scope="session")
def manifest(chunks: list[Path]) -> Manifest:
    """What the chunks are of."""
    return Manifest.read(chunks[0].parent)
