"""The whole of `mdi bench` on a tiny model, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mdi.bench.run import limits_for
from mdi.bench.scenario import Scenario
from mdi.cli.app import app
from mdi.core.errors import ConfigError


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        (Scenario(0, 10, None, 3), "above 0"),
        (Scenario(1, 0, None, 3), "above 0"),
        (Scenario(1, 10, None, 0), "above 0"),
        (Scenario(1, 10, 27, 3), "28 x 28"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(scenario: Scenario, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        limits_for([scenario])


def test_small_images_do_not_lower_the_checkpoints_limit() -> None:
    small, large = Scenario(1, 10, 56, 3), Scenario(1, 10, 448, 3)
    assert limits_for([small], max_pixels=12_544).max_pixels == 12_544
    assert limits_for([large], max_pixels=12_544).max_pixels == (448 + 28) ** 2


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_command_writes_what_it_promises(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sizes = ("--streams", "1,2", "--prompt-lengths", "8,32", "--image-sizes", "56", "--answer-tokens", "4")
    files = ("--out", str(tmp_path / "out"), "--trace", str(tmp_path / "trace.json"))
    done = bench(str(tiny_checkpoint), *sizes, *files, "--peer", "transformers")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(one["streams"], one["prompt_tokens"], one["image_side"]) for one in found["scenarios"]] == [
        (1, 8, None),
        (2, 8, None),
        (1, 32, None),
        (1, 8, 56),
    ]
    for one in found["scenarios"]:
        assert one["prompt_tokens_seen"] == one["transformers"]["prompt_tokens_seen"]
        assert 0 < one["first_token_s"] < one["seconds"]
        assert 0 < one["transformers"]["first_token_s"] < one["transformers"]["seconds"]
    with (tmp_path / "out" / "tokens.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 4 * (1 + 2 + 1 + 1)
    for name in ("tokens", "throughput", "timeline", "memory"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 10
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--streams", "one"), "--streams takes whole numbers"),
        (("--image-sizes", "20"), "28 x 28"),
        (("--peer", "vllm"), "--peer knows transformers"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_checkpoint: Path, arguments: tuple[str, ...], what: str) -> None:
    done = bench(str(tiny_checkpoint), *arguments)
    assert isinstance(done.exception, ConfigError)
    assert what in str(done.exception)
