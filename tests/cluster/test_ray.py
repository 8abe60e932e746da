"""Nodes on a real Ray cluster: three machines beside the starter's, encrypted links, and losses of every kind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from testing.processes import ENVIRONMENT, serving
from testing.waiting import wait_for
from training.held_out import exams

from mdi import Engine, SamplingParams
from mdi.checkpoint.bundled import SHIPPED
from mdi.core.errors import ConfigError, LinkError
from mdi.engine import Completion, Stream

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray has warnings of its own

SMALL: dict[str, Any] = {"n_nodes": 3, "ray_resources": {"CPU": 1, "memory": 2e9}, "sequence_length": 1024}
SMALL_OPTIONS = ("--n-nodes", "3", "--ray-resources", "CPU=1,memory=2e9", "--sequence-length", "1024")
LOST_S = 5.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from testing.ray_cluster import ray_cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # where nodes keep their weights
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_worker_niceness", "0")  # Ray's own is 15: nodes would starve beside other tests
        with ray_cluster(3, cpus=2, dashboard=True) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    """Eight, half of them with an image."""
    seen = [exam.messages() for exam in exams("shape", 4)]
    return [*seen, *(f"Tell me about number {number}." for number in range(4))]


@pytest.fixture(scope="module")
def params() -> list[SamplingParams]:
    """Long answers, so that a loss comes in their middle; greedy and sampled."""
    return [SamplingParams(temperature=number % 2, seed=number, max_tokens=100, ignore_eos=True) for number in range(8)]


@pytest.fixture(scope="module")
def undisturbed(prompts: list[Any], params: list[SamplingParams]) -> list[str]:
    """The texts of one process."""
    with Engine(SHIPPED, dtype="float32", sequence_length=1024) as alone:
        return texts([stream.completion() for stream in submit(alone, prompts, params)])


@pytest.fixture(scope="module")
def engine(cluster: Any) -> Iterator[Engine]:
    from testing.ray_cluster import placed_nodes

    with Engine(SHIPPED, dtype="float32", ray=cluster.address, recovery_timeout_s=200, **SMALL) as engine:
        yield engine
        assert engine.recovery.failed_requests == 0
    wait_for(lambda: not placed_nodes(), LOST_S)


def submit(engine: Engine, prompts: list[Any], params: list[SamplingParams]) -> list[Stream]:
    return [engine.submit(prompt, one) for prompt, one in zip(prompts, params, strict=True)]


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def test_another_version_of_ray_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.41.0")
    with pytest.raises(ConfigError, match=r"runs another version: use one version of Ray.*2\.60.*2\.41"):
        Engine(SHIPPED, ray=cluster.address, **SMALL)


def test_three_machines_answer_as_one_process_does(
    engine: Engine, prompts: list[Any], params: list[SamplingParams], undisturbed: list[str]
) -> None:
    assert texts([stream.completion() for stream in submit(engine, prompts, params)]) == undisturbed
    assert [node.name for node in engine.nodes()] == ["starter", "secondary0", "finisher"]
    assert engine._cluster._monitor.identity is not None  # type: ignore[union-attr]  # the links are encrypted


def test_names_roles_and_what_nodes_do_are_shown_by_ray(engine: Engine, cluster: Any) -> None:
    from ray.util.state import get_log, list_actors, list_placement_groups

    address = cluster.address  # without one Ray takes the latest cluster, which may be another test's
    actors = [actor for actor in list_actors(address, detail=True) if actor.state == "ALIVE"]
    assert sorted(actor.name.rsplit(" ", 1)[1] for actor in actors) == ["finisher", "secondary0"]
    assert {actor.repr_name for actor in actors} == {"mdi finisher", "mdi secondary0"}
    group, *_ = [group for group in list_placement_groups(address) if group.state == "CREATED"]
    assert group.name.startswith("mdi bundled ")
    finisher = next(actor for actor in actors if actor.name.endswith("finisher"))
    log = "".join(get_log(address, actor_id=finisher.actor_id, suffix="err"))
    assert "finisher: has its weights" in log


def test_a_cluster_without_room_says_what_is_missing_and_what_is_there(engine: Engine, cluster: Any) -> None:
    with pytest.raises(ConfigError, match=r"too small for 2 nodes .* needs CPU 64, .* are .*\(CPU 2, memory"):
        Engine(SHIPPED, ray=cluster.address, **{**SMALL, "ray_resources": {"CPU": 64}})
    with pytest.raises(ConfigError, match=r"needs CPU 1, memory 0\.\d GB, accelerator 1.*\(.*accelerator 0\)"):
        Engine(SHIPPED, ray=cluster.address, **{**SMALL, "ray_resources": {"CPU": 1, "accelerator": 1}})
    with pytest.raises(LinkError, match=r"no room yet .* needs CPU 2, .* free are .*CPU 1, .* within 3 s \(--wait-s\)"):
        Engine(SHIPPED, ray=cluster.address, wait_s=3, **{**SMALL, "ray_resources": {"CPU": 2}})


@pytest.mark.parametrize("lost", ["node process", "actor", "machine"])
def test_streams_survive_a_loss(
    lost: str,
    engine: Engine,
    cluster: Any,
    prompts: list[Any],
    params: list[SamplingParams],
    undisturbed: list[str],
) -> None:
    from testing.ray_cluster import actor_of, machine_of, placed_nodes

    recoveries = engine.recovery.recoveries
    streams = submit(engine, prompts, params)
    begun = [next(stream).text for stream in streams]
    (node,) = placed_nodes("finisher" if lost == "actor" else "secondary0")
    machine, actor = machine_of(cluster, node), actor_of(node)
    if lost == "node process":
        node.kill()
    elif lost == "actor":
        actor.kill()
    else:
        cluster.remove_node(machine, allow_graceful=False)
    rest = texts([stream.completion() for stream in streams])
    assert [first + more for first, more in zip(begun, rest, strict=True)] == undisturbed
    assert engine.recovery.recoveries > recoveries, "it was lost too late"
    assert engine.ready(60)
    assert not node.is_running()
    (new,) = placed_nodes("finisher" if lost == "actor" else "secondary0")
    assert (machine_of(cluster, new) == machine) == (lost != "machine")
    assert (actor_of(new) == actor) == (lost == "node process")
    if lost == "machine":
        cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)


def test_a_second_server_shares_the_cluster_and_nothing_is_left_when_it_is_killed(
    engine: Engine, cluster: Any, undisturbed: list[str], prompts: list[Any], params: list[SamplingParams]
) -> None:
    from testing.ray_cluster import actor_of, placed_nodes

    before = placed_nodes()
    with serving("bundled", "--ray", cluster.address, *SMALL_OPTIONS) as (server, url):
        theirs = [node for node in placed_nodes() if node not in before]
        assert len(theirs) == 2
        body = {"model": "bundled", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        left = [*theirs, *(actor_of(node) for node in theirs)]
        server.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(left, timeout=LOST_S)
        assert alive == []
    assert engine.chat(prompts[0], params[0]).text == undisturbed[0]
    assert sorted(node.pid for node in placed_nodes()) == sorted(node.pid for node in before)


def test_a_submitted_job_finds_the_cluster_and_ends_as_it_is_told(engine: Engine, cluster: Any, tmp_path: Path) -> None:
    dashboard = f"http://{cluster.head_node.webui_url}"
    # Ray gives a job the address of any cluster of the machine: here another test's may just come or go.
    ours = ["env", f"RAY_ADDRESS={cluster.address}"]
    command = [*ours, sys.executable, "-m", "mdi", "ask", "bundled", "Hello", "--ray", "auto", *SMALL_OPTIONS]
    submitted = subprocess.run(
        ["ray", "job", "submit", "--address", dashboard, "--", *command],
        capture_output=True,
        text=True,
        timeout=100,
        env={**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "has its weights" in submitted.stdout
    assert "succeeded" in submitted.stdout
