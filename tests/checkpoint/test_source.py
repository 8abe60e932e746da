"""A checkpoint is whatever has names, specs and tensors; its file format is its own business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdi.checkpoint.loader import load_source
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import Source, open_source
from mdi.core.errors import CheckpointError
from mdi.core.quantization import UNQUANTIZED, Quantization, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig


class MemorySource:
    """Another format: the tensors of a checkpoint in memory, in float64."""

    def __init__(self, source: Source, path: Path) -> None:
        self.path = self.home = path
        self.config: dict[str, Any] = source.config
        self.model_config: ModelConfig = source.model_config
        self.quantization, self.is_exact = UNQUANTIZED, True
        self.files = (path / "weights",)
        self.files[0].write_text("in memory")
        self._tensors = {name: source.tensor(name).double() for name in source.names()}

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(tuple(self._tensors[name].shape), "float64")

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor | None:
        return None


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        open_source(tmp_path / "nowhere")


def test_another_format_gives_the_same_chunks_and_the_same_stage(source: Source, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = MemorySource(source, tmp_path / "other")
    ours, theirs = (Manifest.read(prepare(opened, 2)) for opened in (source, other))
    assert ours.chunks == theirs.chunks
    assert [file.name for file in theirs.source] == ["weights"]
    embeddings = [load_source(opened).decoder.embedding for opened in (source, other)]
    assert embeddings[0] is not None
    assert embeddings[1] is not None
    assert torch.equal(embeddings[0], embeddings[1])
