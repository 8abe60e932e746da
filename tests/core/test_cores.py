"""How many cores a process may use, by affinity and by the quotas of control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from mdi.core import cores
from mdi.core.cores import default_threads, quota_cores, usable_cores


def write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content + "\n")


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.mark.parametrize(("content", "expected"), [("150000 100000", 1.5), ("max 100000", math.inf), ("", math.inf)])
def test_a_quota_of_version_2(tmp_path: Path, groups: Path, content: str, expected: float) -> None:
    write(groups, "0::/")
    write(tmp_path / "mounted/cpu.max", content)
    assert quota_cores(groups, tmp_path / "mounted") == expected


def test_the_smallest_quota_of_a_group_and_those_above_it_counts(tmp_path: Path, groups: Path) -> None:
    write(groups, "0::/system.slice/app.service")
    write(tmp_path / "mounted/cpu.max", "max 100000")
    write(tmp_path / "mounted/system.slice/cpu.max", "200000 100000")
    write(tmp_path / "mounted/system.slice/app.service/cpu.max", "400000 100000")
    assert quota_cores(groups, tmp_path / "mounted") == 2


@pytest.mark.parametrize(("quota", "expected"), [("50000", 0.5), ("-1", math.inf)])
def test_a_quota_of_version_1(tmp_path: Path, groups: Path, quota: str, expected: float) -> None:
    write(groups, "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc")
    write(tmp_path / "mounted/cpu,cpuacct/cpu.cfs_quota_us", quota)  # a container sees its own group at the top
    write(tmp_path / "mounted/cpu,cpuacct/cpu.cfs_period_us", "100000")
    write(tmp_path / "mounted/memory/cpu.cfs_quota_us", "1")
    assert quota_cores(groups, tmp_path / "mounted") == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert quota_cores(tmp_path / "missing", tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "expected"), [(0.3, 1), (2.9, 2), (64.0, 3), (math.inf, 3)])
def test_usable_cores_are_whole_and_at_least_one(monkeypatch: pytest.MonkeyPatch, quota: float, expected: int) -> None:
    monkeypatch.setattr(cores, "quota_cores", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 7}, raising=False)
    assert usable_cores() == expected


@pytest.mark.parametrize(
    ("asked", "expected"), [("2", 2), ("1,4", 1), (" 2 ", 2), ("9", 3), ("0", 3), ("-1", 3), ("many", 3), ("", 3)]
)
def test_omp_num_threads_limits_the_cores(monkeypatch: pytest.MonkeyPatch, asked: str, expected: int) -> None:
    monkeypatch.setattr(cores, "quota_cores", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 7}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_limits_the_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
