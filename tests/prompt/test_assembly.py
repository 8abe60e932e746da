"""Videos whose grids are images behind their times, in prompts."""

from __future__ import annotations

import numpy as np
import pytest
from testing.checkpoints import tiny_deepstack_config

from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.media import Patches
from mdi.models.registry import read_config
from mdi.prompt.assembly import Prompt, assemble
from mdi.prompt.tokenizer import Tokenizer

CONFIG = read_config(tiny_deepstack_config())
START, END, IMAGE, VIDEO = 259, 260, 262, 263
FILM = Patches(np.arange(48, dtype=np.float32)[:, None], (2, 4, 6), b"film", seconds=1.0, times_s=(0.25, 1.25))
STILL = Patches(np.zeros((8, 1), dtype=np.float32), (1, 2, 4), b"still")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_random_checkpoint(tmp_path_factory.mktemp("timed") / "model", tiny_deepstack_config()))


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> Prompt:
    """Of a video, an image, and the video again."""
    ids = [65, START, VIDEO, END, START, IMAGE, END, START, VIDEO, END, 66]
    return assemble(ids, [FILM, STILL, FILM], CONFIG, tokenizer)


def test_each_grid_has_its_time_and_its_marks(prompt: Prompt) -> None:
    first, second = (
        [*f"<{time} seconds>".encode(), START, *[VIDEO] * 6, END]
        for time in ("0.2", "1.2")  # halves to even
    )
    assert list(prompt.token_ids) == [65, *first, *second, START, IMAGE, IMAGE, END, *first, *second, 66]


def test_each_grid_is_an_image_of_its_own(prompt: Prompt) -> None:
    assert [item.patches.grid for item in prompt.media] == [(1, 4, 6)] * 2 + [(1, 2, 4)] + [(1, 4, 6)] * 2
    assert [item.patches.rows[:, 0].tolist() for item in prompt.media[:2]] == [list(range(24)), list(range(24, 48))]
    digests = [item.patches.digest for item in prompt.media]
    assert digests[:2] == digests[3:]
    assert len(set(digests)) == 3
    for item in prompt.media:
        start, end = item.span.start, item.span.start + item.span.length
        assert len(set(prompt.prefix_keys[start:end])) == 1
        assert set(prompt.token_ids[start:end]) <= {IMAGE, VIDEO}


def test_a_video_without_marks_gets_the_same(prompt: Prompt, tokenizer: Tokenizer) -> None:
    """As with a template that writes the placeholder alone; marks of something else stay."""
    bare = assemble([65, VIDEO, START, IMAGE, END, VIDEO, 66], [FILM, STILL, FILM], CONFIG, tokenizer)
    assert bare.token_ids == prompt.token_ids
    kept = assemble([START, 67, VIDEO, END], [FILM], CONFIG, tokenizer)
    assert (kept.token_ids[:2], kept.token_ids[-2:]) == ((START, 67), (END, END))
