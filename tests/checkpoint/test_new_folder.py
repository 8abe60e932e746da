"""A folder appears when everything in it is written, and replaces none that is in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdi.checkpoint.locks import Hold, exclusive
from mdi.checkpoint.new_folder import FolderInUseError, new_folder


def write(folder: Path, text: str) -> None:
    with new_folder(folder, 10, "the words") as unfinished:
        (unfinished / "file").write_text(text)
        assert not folder.exists() or (folder / "file").read_text() != text


def test_it_takes_its_name_at_the_end_and_replaces_the_one_before(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write(tmp_path / "made" / "folder", text)
        assert (tmp_path / "made" / "folder" / "file").read_text() == text
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["folder"]


def test_a_folder_in_use_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "folder", "first")
    hold = Hold(tmp_path / "folder")
    with pytest.raises(FolderInUseError, match="is in use by a running server: stop it first"):
        write(tmp_path / "folder", "second")
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    hold.close()
    write(tmp_path / "folder", "second")


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    for name in (".folder-killed", ".folder-running"):
        (tmp_path / name).mkdir()
    with exclusive(tmp_path / ".folder-running"):
        write(tmp_path / "folder", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", ".folder-running"}
