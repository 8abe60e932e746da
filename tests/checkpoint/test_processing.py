"""Image and video settings come from the checkpoint's files, within the server's limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdi.checkpoint.processing import patch_spec, video_spec
from mdi.core.errors import CheckpointError
from mdi.media import VideoSpec


def test_the_checkpoints_and_the_servers_limits_hold_for_videos(tmp_path: Path) -> None:
    assert video_spec(tmp_path) == VideoSpec()
    config = '{"size": {"shortest_edge": 12544, "longest_edge": 50176}, "fps": 1}'
    (tmp_path / "video_preprocessor_config.json").write_text(config)
    assert video_spec(tmp_path) == VideoSpec(fps=1, min_pixels=12544, max_pixels=50176)
    assert video_spec(tmp_path, max_pixels=20_000).max_pixels == 20_000
    assert video_spec(tmp_path, max_pixels=10**6).max_pixels == 50176


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_damaged_files_are_named_with_the_remedy(text: str, tmp_path: Path) -> None:
    for read in (patch_spec, video_spec):
        name = {patch_spec: "preprocessor_config.json", video_spec: "video_preprocessor_config.json"}[read]
        (tmp_path / name).write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=f"^{name} is not a valid JSON object: download it again"):
            read(tmp_path)
