"""Options that commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from mdi.cli.options import CheckpointOptions, grouped, parse_numbers
from mdi.core.errors import ConfigError


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(min=1)] = 3
    height: int = 4


def test_fields_of_a_dataclass_are_options_in_its_place() -> None:
    app = typer.Typer()

    @app.command()
    @grouped
    def draw(name: str, size: Size, checkpoint: CheckpointOptions, color: str = "red") -> None:
        print(name, size, checkpoint.ckpt_folder, color)

    runner = CliRunner()
    shown = runner.invoke(app, ["x", "--height", "7", "--ckpt-folder", "kept", "--color", "blue"])
    assert shown.output == "x Size(width=3, height=7) kept blue\n"
    assert runner.invoke(app, ["x", "--width", "0"]).exit_code == 2
    assert runner.invoke(app, ["x"]).output == f"x {Size()} {Path('checkpoints')} red\n"


def test_numbers_have_commas_between_them() -> None:
    assert parse_numbers("10,10,8", "--layers") == (10, 10, 8)
    with pytest.raises(ConfigError, match="--layers takes whole numbers"):
        parse_numbers("10;8", "--layers")
