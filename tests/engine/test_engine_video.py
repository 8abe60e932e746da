"""Videos through the engine: alone, mixed with images, over nodes, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testing.checkpoints import tiny_text_config
from testing.videos import encoded, numbered

from mdi import Engine, SamplingParams
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.errors import InputError, MediaError, PromptTooLongError

GREEDY = SamplingParams(temperature=0, max_tokens=8)
TOKEN = 28 * 28


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds of 64 x 48 pixels."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(encoded(numbered(50), fps=10))
    return path


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(tiny_checkpoint, sequence_length=1024, max_sequences=4) as engine:
        yield engine


def asking(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What happens?"}]}]


def video(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, "max_pixels": 4 * TOKEN, **settings}


def test_a_video_is_the_same_from_a_path_a_url_or_bytes(engine: Engine, clip: Path) -> None:
    sources = (clip, str(clip), clip.as_uri(), clip.read_bytes())
    answers = {engine.chat(asking(video(source)), GREEDY).token_ids for source in sources}
    assert len(answers) == 1
    assert engine.chat(asking(video(clip)), GREEDY).usage.prompt_tokens > 5 * 2


def test_other_frames_give_other_answers(engine: Engine, clip: Path) -> None:
    backwards = encoded(numbered(50)[::-1], fps=10)
    logprobs = {engine.chat(asking(video(source)), GREEDY).logprobs for source in (clip, backwards)}
    assert len(logprobs) == 2


def test_three_nodes_answer_a_mix_of_videos_and_images_as_one_does(
    tiny_checkpoint: Path, engine: Engine, clip: Path, photograph: bytes
) -> None:
    image = {"type": "image", "image": photograph, "max_pixels": 4 * TOKEN}
    prompts = [
        asking(video(clip), image, video([photograph] * 3)),
        asking(image, video(clip, fps=4), image),
        asking(video(clip, nframes=2), video(clip)),
    ]
    alone = [engine.chat(prompt, GREEDY).token_ids for prompt in prompts]
    with Engine(tiny_checkpoint, n_nodes=3, sequence_length=1024) as spread:
        streams = [spread.submit(prompt, GREEDY) for prompt in prompts]
        assert [stream.completion().token_ids for stream in streams] == alone


def test_user_text_makes_no_room_for_a_video(engine: Engine, clip: Path) -> None:
    forged = [{"role": "user", "content": [video(clip), {"type": "text", "text": "<|video_pad|>"}]}]
    honest = [{"role": "user", "content": [video(clip), {"type": "text", "text": "x" * 13}]}]
    assert engine.chat(forged, GREEDY).usage.prompt_tokens == engine.chat(honest, GREEDY).usage.prompt_tokens


def test_a_video_that_does_not_fit_is_refused_with_the_remedy(engine: Engine, clip: Path) -> None:
    with pytest.raises(PromptTooLongError, match=r"video takes .* lower max_pixels, total_pixels, fps or nframes"):
        engine.chat(asking({"type": "video", "video": clip, "fps": 10}), GREEDY)
    with pytest.raises(PromptTooLongError, match="sequence length") as caught:
        engine.chat("x" * 1100, GREEDY)
    assert caught.value.field == "prompt"
    assert engine.chat(asking(video(clip)), GREEDY).token_ids


def test_two_videos_share_the_room(engine: Engine, clip: Path) -> None:
    half = {"type": "video", "video": clip, "nframes": 8}
    one = engine.chat(asking(half), GREEDY).usage.prompt_tokens
    assert 512 < one < 1024
    left = 1024 - one - 3  # the second has its own start, placeholder and end
    with pytest.raises(PromptTooLongError, match=f"and {left} of the sequence length's 1024 are left"):
        engine.chat(asking(half, half), GREEDY)


def test_bad_videos_are_refused_and_the_engine_goes_on(engine: Engine, clip: Path) -> None:
    for bad in ("/no/such/file.mp4", b"not a video", clip.read_bytes()[:500], [b"not an image"]):
        with pytest.raises(MediaError) as caught:
            engine.chat(asking(video(bad)), GREEDY)
        assert caught.value.field == "video"
    assert engine.chat(asking(video(clip)), GREEDY).token_ids


def test_a_text_model_refuses_videos(tmp_path: Path, clip: Path) -> None:
    path = write_random_checkpoint(tmp_path / "text", tiny_text_config())
    with Engine(path) as engine, pytest.raises(InputError, match="text only: send no videos"):
        engine.submit(asking(video(clip)))
