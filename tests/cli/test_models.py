"""`mdi models` names every family, and so do the documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdi.cli.app import app
from mdi.models.registry import FAMILIES

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def test_every_family_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["models"])
    assert shown.exit_code == 0
    for architecture in FAMILIES:
        assert architecture in shown.output
        assert f"`{architecture}`" in DOCS.read_text()
