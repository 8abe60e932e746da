"""A Ray cluster that is closed: Ray's own channel encrypted, and none let in without the token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from testing.certificates import self_signed
from testing.processes import command

from mdi.checkpoint.bundled import SHIPPED

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

TOKEN = "f" * 64
PICTURE = SHIPPED.parent / "samples" / "tools-1-1.png"


# In a process of its own, which prints its address: Ray reads these settings when it is imported.
CLUSTER = """
from testing.ray_cluster import ray_cluster
with ray_cluster(1, cpus=2) as cluster:
    print(cluster.address, flush=True)
    input()
"""


@dataclass(frozen=True)
class ClosedCluster:
    address: str
    settings: dict[str, str]

    def ask(self, **changed: str) -> subprocess.CompletedProcess[str]:
        options = ("--ray", self.address, "--n-nodes", "2", "--ray-resources", "CPU=1,memory=1e9")
        words = command("ask", SHIPPED, "What do you see?", "--image", PICTURE, *options)
        environment = {**os.environ, **self.settings, **changed}
        return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedCluster]:
    from ray._private.services import get_node_ip_address

    certificate = str(self_signed(tmp_path_factory.mktemp("tls"), "localhost", "127.0.0.1", get_node_ip_address()))
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": certificate,
        "RAY_TLS_SERVER_KEY": certificate,
        "RAY_TLS_CA_CERT": certificate,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words, root = [sys.executable, "-c", CLUSTER], Path(__file__).parents[2]
    with subprocess.Popen(words, env={**os.environ, **settings}, cwd=root, **pipes) as process:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address
        yield ClosedCluster(address, settings)
        process.communicate("\n")


def test_who_has_token_and_certificate_may_use_it(cluster: ClosedCluster) -> None:
    answer = cluster.ask()
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()


def test_who_has_another_token_may_not(cluster: ClosedCluster) -> None:
    refused = cluster.ask(RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 2
    assert "does not let this command in: where it wants a token, set RAY_AUTH_MODE=token" in refused.stderr


def test_who_does_not_encrypt_may_not(cluster: ClosedCluster) -> None:
    refused = cluster.ask(RAY_USE_TLS="0")
    assert refused.returncode == 2
    assert "is no head of a Ray cluster: its port is 6379 unless set; one with RAY_USE_TLS=1" in refused.stderr
