"""What commands show, here without a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mdi.cli import screen
from mdi.cli.screen import BytesProgress, Startup, nodes_table
from mdi.core.status import NodeStatus


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to the error console."""
    text = io.StringIO()
    monkeypatch.setattr(screen, "err", Console(file=text, markup=False, emoji=False, highlight=False, width=80))
    return text


def presence(name: str, there: bool, note: str) -> Any:
    return SimpleNamespace(node=SimpleNamespace(name=name, address="10.0.0.2:5000"), there=there, note=note)


def test_work_in_bytes_has_a_line_at_its_start_and_at_its_end(shown: io.StringIO) -> None:
    progress = BytesProgress()
    progress("receiving", 0, 3_000_000)
    progress("receiving", 1_000_000, 3_000_000)
    progress("receiving", 3_000_000, 3_000_000)
    progress("loading", 5, 5)
    assert shown.getvalue().splitlines() == [
        "receiving: 3.0 of 3.0 MB to go",
        "receiving: done",
        "loading: 0.0 of 0.0 MB to go",
        "loading: done",
    ]


def test_a_node_has_a_line_whenever_its_state_changes(shown: io.StringIO) -> None:
    startup = Startup()
    with startup.shown():
        startup.waiting([presence("secondary0", False, "nothing listens [/x]"), presence("finisher", True, "")])
        startup.waiting([presence("secondary0", False, "nothing listens [/x]"), presence("finisher", True, "")])
        startup.waiting([presence("secondary0", True, "loads"), presence("finisher", True, "")])
    assert shown.getvalue().splitlines() == [
        "node secondary0 is awaited: nothing listens [/x]",
        "node secondary0 is there: loads",
    ]


def test_the_table_of_nodes_tells_layers_images_and_spares_apart() -> None:
    def node(name: str, first: int, last: int, dtype: str) -> NodeStatus:
        return NodeStatus(name, "ready", first, last, dtype, "cpu", 10**9, 1, 0.0, 0, 0)

    nodes = [node("starter", 0, 11, "bfloat16"), node("vision", 0, 0, "bfloat16"), node("spare0", 0, 0, "")]
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(nodes_table("Qwen2-VL", nodes))
    lines = console.export_text().splitlines()
    for name, held in (("starter", "0-10"), ("vision", "images"), ("spare0", "spare")):
        assert any(name in line and held in line for line in lines)
