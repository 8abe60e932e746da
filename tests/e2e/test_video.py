"""`mdi ask --video`, as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from testing.videos import encoded, numbered

from mdi.cli import app as cli


def ask(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, *arguments: str | Path) -> None:
    """In this process: starting one takes seconds."""
    settings = ("--max-tokens", "24", "--temperature", "1.5", "--seed", "1", "--max-pixels", "20000")
    monkeypatch.setattr(sys, "argv", ["mdi", "ask", str(checkpoint), "What happens?", *settings, *map(str, arguments)])
    cli.main()


def answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], checkpoint: Path, *arguments: str | Path
) -> str:
    with pytest.raises(SystemExit) as ended:
        ask(monkeypatch, checkpoint, *arguments)
    assert not ended.value.code
    return capfd.readouterr().out


def test_videos_and_images_are_asked_about_together(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tiny_checkpoint: Path,
    tmp_path: Path,
    photograph: bytes,
) -> None:
    clip, picture = tmp_path / "clip.mp4", tmp_path / "cup.png"
    clip.write_bytes(encoded(numbered(20)))
    picture.write_bytes(photograph)
    options = [("--video", clip), ("--video", clip, "--video", clip), ("--video", clip, "--image", picture), ()]
    answers = [answer(monkeypatch, capfd, tiny_checkpoint, *chosen) for chosen in options]
    assert len(set(answers)) == 4
    assert all(text.strip() for text in answers)


@pytest.mark.parametrize(("source", "message"), [("/no/such.mp4", "no file"), ("data:,x", "not a video")])
def test_a_bad_video_ends_with_exit_code_2_and_the_cause(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tiny_checkpoint: Path,
    source: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        ask(monkeypatch, tiny_checkpoint, "--video", source)
    assert ended.value.code == 2
    assert message in capfd.readouterr().err


def test_verify_finds_no_difference_on_a_video(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(encoded(numbered(8)))
    options = ("--video", str(clip), "--n-nodes", "2", "--max-tokens", "4")
    monkeypatch.setattr(sys, "argv", ["mdi", "verify", str(tiny_checkpoint), "What happens?", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "all 4 greedy tokens are equal" in capfd.readouterr().out
