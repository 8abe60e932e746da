"""Folders that are used are not replaced or removed meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mdi.checkpoint.locks import Hold, exclusive, in_use


def test_many_may_use_a_folder_and_nothing_replaces_it_until_the_last_is_done(tmp_path: Path) -> None:
    first, second = Hold(tmp_path), Hold(tmp_path)
    for hold in (first, second):
        assert in_use(tmp_path)
        with pytest.raises(BlockingIOError), exclusive(tmp_path):
            pass
        hold.close()
        hold.close()
    assert not in_use(tmp_path)
    with exclusive(tmp_path):
        assert in_use(tmp_path)


def test_a_folder_that_is_not_there_is_not_in_use(tmp_path: Path) -> None:
    assert not in_use(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        Hold(tmp_path / "nothing")


def test_whoever_waited_for_a_folder_that_was_replaced_does_not_get_the_old_one(tmp_path: Path) -> None:
    folder, errors, begun = tmp_path / "folder", list[Exception](), threading.Event()
    folder.mkdir()

    def hold() -> None:
        begun.set()
        try:
            Hold(folder)
        except FileNotFoundError as error:
            errors.append(error)

    with exclusive(folder):
        waiting = threading.Thread(target=hold)
        waiting.start()
        begun.wait()
        waiting.join(0.2)
        assert waiting.is_alive()
        folder.rename(tmp_path / "old")
        folder.mkdir()
    waiting.join()
    assert len(errors) == 1
    Hold(folder).close()
