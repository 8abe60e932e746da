"""The JSON files of a checkpoint are read, or named with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdi.checkpoint.json_file import read_json
from mdi.core.errors import CheckpointError


def test_an_object_is_read_in_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"größe": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"größe": 1}


def test_a_missing_file_is_an_error_unless_it_is_optional(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json", optional=True) == {}
    with pytest.raises(CheckpointError, match=r"has no a\.json: it is not a checkpoint in Hugging Face layout"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff"])
def test_anything_but_an_object_is_damaged(content: bytes, optional: bool, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json is not a valid JSON object: download it again"):
        read_json(tmp_path / "a.json", optional=optional)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(CheckpointError, match=r"a\.json' cannot be read \(Is a directory\)"):
        read_json(tmp_path / "a.json")
