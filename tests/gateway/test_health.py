"""Liveness, readiness and node status."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from testing.fakes import FakeEngine

from mdi.core.errors import LinkError
from mdi.core.status import RecoveryStatus
from mdi.gateway import server as gateway
from tests.gateway.conftest import LONG_WAIT_S, FakeServer


def test_health_reports_a_lost_node_without_a_key(server: FakeServer) -> None:
    server.engine.error = LinkError("node finisher broke")
    answer = httpx.get(server.url + "/health")
    assert answer.status_code == 503
    assert answer.json() == {"status": "unavailable", "detail": "node finisher broke"}
    server.engine.answer_ready = lambda: False
    assert httpx.get(server.url + "/health/ready").json() == answer.json()


def test_a_server_whose_nodes_are_lost_for_good_says_so_and_then_ends_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway, "FAILED_S", 2.0)
    engine, bound = FakeEngine(), gateway.bind("127.0.0.1", 0)
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(gateway.serve, engine, bound)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/health"
        assert httpx.get(url, timeout=LONG_WAIT_S).status_code == 200
        engine.error = LinkError("node finisher broke")
        assert httpx.get(url, timeout=LONG_WAIT_S).status_code == 503
        with pytest.raises(LinkError, match="node finisher broke"):
            ended.result(LONG_WAIT_S)


def test_the_server_is_ready_when_a_token_comes_through(server: FakeServer) -> None:
    answer = httpx.get(server.url + "/health/ready")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("recovering", [True, False])
def test_a_server_that_is_not_ready_says_when_to_ask_again(server: FakeServer, recovering: bool) -> None:
    server.engine.answer_ready = lambda: False
    server.engine.recovery = RecoveryStatus(recovering, recoveries=3, failed_requests=0)
    answer = httpx.get(server.url + "/health/ready")
    status = "recovering" if recovering else "busy"
    assert (answer.status_code, answer.json()) == (503, {"status": status})
    assert int(answer.headers["retry-after"]) > 0
    assert httpx.get(server.url + "/health").json()["status"] == ("recovering" if recovering else "ok")


def test_simultaneous_checks_share_one_token(server: FakeServer) -> None:
    asked, answer = [], threading.Event()

    def ready() -> bool:
        asked.append(1)
        return answer.wait(LONG_WAIT_S)

    server.engine.answer_ready = ready
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(httpx.get, server.url + "/health/ready", timeout=LONG_WAIT_S) for _ in range(8)]
        assert httpx.get(server.url + "/health").status_code == 200  # meanwhile
        time.sleep(0.3)
        answer.set()
        assert {answer.result().status_code for answer in answers} == {200}
    assert len(asked) <= 2  # on a busy machine, some may come after the answer


def test_nodes_are_shown_with_what_they_hold_and_do(server: FakeServer) -> None:
    server.engine.recovery = RecoveryStatus(recovering=False, recoveries=3, failed_requests=2)
    answer = server.get("/v1/nodes").json()
    assert (answer["recovering"], answer["recoveries"], answer["failed_requests"]) == (False, 3, 2)
    [node] = answer["nodes"]
    assert (node["name"], node["state"], node["first_layer"], node["last_layer"]) == ("starter", "ready", 0, 2)
    assert {
        "resident_bytes",
        "pid",
        "busy_share",
        "sent_bytes",
        "received_bytes",
        "round_trip_s",
        "restarts",
        "kernels",
    } < {*node}
