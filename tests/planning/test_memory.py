"""Free memory: what the machine has, and what a control group allows."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import pytest
import torch

from mdi.planning.memory import free_bytes, group_free_bytes

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_some_memory_is_free_here_and_no_more_than_there_is() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_a_group_allows_what_it_does_not_use_and_cached_files_are_not_used(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/one/two\n")
    group(tmp_path / "one/two", V2, "1000", used=700, cached=200)
    assert group_free_bytes(own, tmp_path) == 500


@pytest.mark.parametrize(("outer", "free"), [("max", 500), ("800", 300), ("100", 0)])
def test_the_groups_around_it_count_as_well(tmp_path: Path, outer: str, free: int) -> None:
    own = tmp_path / "own"
    own.write_text("3:cpu:/elsewhere\n4:memory,hugetlb:/one/two\n")
    group(tmp_path / "memory/one/two", V1, "1000", used=700, cached=200)
    group(tmp_path / "memory/one", V1, outer, used=700, cached=200)
    assert group_free_bytes(own, tmp_path) == free


def test_without_a_limit_and_without_groups_all_is_free(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/\n")
    assert group_free_bytes(own, tmp_path) == group_free_bytes(tmp_path / "none", tmp_path) == math.inf
    group(tmp_path, V2, "max", used=5, cached=1)
    assert group_free_bytes(own, tmp_path) == math.inf
