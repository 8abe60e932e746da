"""A checkpoint in a folder that cannot be written, such as a shared model store or a snapshot of the hub's cache."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from testing.permissions import obey_permissions, read_only
from testing.processes import ENVIRONMENT, command

QUESTION = ("Hello", "--max-tokens", "8", "--temperature", "1", "--seed", "4")


@pytest.fixture
def snapshot(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Files as the hub's cache has them: symbolic links to blobs."""
    snapshot, blobs = tmp_path / "store" / "snapshots" / "1234", tmp_path / "store" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(file for file in tiny_checkpoint.iterdir() if file.is_file()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def run(home: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=200,
        env={**ENVIRONMENT, "XDG_CACHE_HOME": str(home), **variables},
        preexec_fn=obey_permissions,
    )


def answer(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_several_nodes_serve_it_from_chunks_in_the_cache(snapshot: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with read_only(tmp_path / "store"):
        alone = answer(run(home, "ask", snapshot, *QUESTION))
        assert answer(run(home, "ask", snapshot, *QUESTION, "--n-nodes", "2")) == alone
        [entry] = (home / "mdi" / "chunks").iterdir()
        before = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
        assert answer(run(home, "ask", snapshot, *QUESTION, "--n-nodes", "2")) == alone
        assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == before
        assert not (snapshot / "chunks").exists()
        listed = answer(run(home, "cache", "ls"))
        assert "-2nodes" in listed
        assert "1234, float32: finisher, starter" in listed
        assert "in use" not in listed


def test_chunks_that_do_not_fit_into_the_cache_are_refused_with_the_remedy(snapshot: Path, tmp_path: Path) -> None:
    with read_only(tmp_path / "store"):
        done = run(tmp_path / "home", "prepare", snapshot, "--n-nodes", "2", MDI_CACHE_GB="0.0001")
        assert done.returncode == 2
        assert "do not fit into the cache folder" in done.stderr
        assert "Raise MDI_CACHE_GB" in done.stderr


def test_a_cache_that_cannot_be_written_either_is_named(snapshot: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with read_only(tmp_path):
        done = run(home, "prepare", snapshot, "--n-nodes", "2")
    assert done.returncode == 2
    assert f"the cache folder '{home}/mdi/chunks' cannot be made" in done.stderr
