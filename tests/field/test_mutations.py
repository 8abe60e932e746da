"""Random damage to the JSON files of a checkpoint: the answers are transformers', or the file is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from testing.checkpoints import tiny_config, tiny_text_config
from testing.mutations import mutated, mutations, outcome_of

from mdi.checkpoint.random_weights import write_random_checkpoint

FIXED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Qwen2-VL in one file, and a Qwen2 in two with an index."""
    parent = tmp_path_factory.mktemp("mutations")
    return [
        write_random_checkpoint(parent / "vision", tiny_config(num_hidden_layers=2)),
        write_random_checkpoint(parent / "text", tiny_text_config(num_hidden_layers=2), shards=2),
    ]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(data.coffee()).resize((112, 84))


@pytest.mark.filterwarnings("ignore")  # of transformers, about what it is given
@pytest.mark.parametrize("count", [60, pytest.param(120, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_answers_as_transformers_or_is_refused_by_name(
    count: int, folders: list[Path], picture: Image.Image
) -> None:
    """2,000 of them: `python -m benchmarks.mutations`."""

    @settings(FIXED, max_examples=count)
    @given(st.data())
    def attempt(drawn: st.DataObject) -> None:
        folder = drawn.draw(st.sampled_from(folders))
        mutation = drawn.draw(mutations(folder))
        with mutated(folder, mutation) as path:
            outcome_of(path, mutation, picture)

    attempt()
