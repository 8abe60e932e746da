"""The shipped checkpoint is copied to where chunks can be written beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdi import Engine, SamplingParams
from mdi.checkpoint import bundled
from mdi.checkpoint.hub import locate
from mdi.checkpoint.safetensors import SINGLE
from mdi.core.errors import CheckpointError


def test_the_bundled_model_is_copied_once_and_again_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, folder = tmp_path / "shipped", tmp_path / "checkpoints"
    shipped.mkdir()
    (shipped / SINGLE).write_bytes(b"first")
    monkeypatch.setattr(bundled, "SHIPPED", shipped)
    copy = locate("bundled", ckpt_folder=folder)
    assert copy == folder / "bundled"
    (copy / "chunks").mkdir()
    assert locate("bundled", ckpt_folder=folder, download=False) == copy
    assert (copy / "chunks").exists()
    (shipped / SINGLE).write_bytes(b"other")
    locate("bundled", ckpt_folder=folder)
    assert (copy / SINGLE).read_bytes() == b"other"
    assert [path.name for path in folder.iterdir()] == ["bundled"]
    assert not (copy / "chunks").exists()


def test_a_bundled_model_that_cannot_be_copied_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match="--ckpt-folder"):
        locate("bundled", ckpt_folder=tmp_path / "file")


def test_it_is_served_over_nodes_in_one_dtype_after_the_other(tmp_path: Path) -> None:
    answers = []
    for n_nodes, dtype in ((2, "bfloat16"), (2, "float32"), (1, "float32")):
        with Engine("bundled", n_nodes=n_nodes, dtype=dtype, ckpt_folder=tmp_path, sequence_length=64) as engine:
            assert {node.dtype for node in engine.nodes()} == {dtype}
            answers.append(engine.chat("Hello", SamplingParams(temperature=0, max_tokens=8)).token_ids)
    assert answers[1] == answers[2]
