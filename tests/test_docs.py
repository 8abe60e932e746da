"""Docs that can be checked: the page of commands, links, and the files that pages name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from testing.docs import MODELS, PAGE, commands_page, models_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_commands_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == commands_page(), "run `make docs`"


def test_the_sizes_of_models_are_current() -> None:
    assert MODELS.read_text(encoding="utf-8") == models_page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    names = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|proto|md|json|safetensors))`", page.read_text(encoding="utf-8"))
    places = (ROOT, ROOT / "src", ROOT / "src" / "mdi")
    missing = [name for name in names if not any((place / name).exists() for place in places)]
    assert not missing
