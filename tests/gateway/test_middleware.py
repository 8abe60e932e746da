"""The API key, and the limit on bodies."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.gateway.conftest import KEY, REAL_KEY, FakeServer, RealServer


@pytest.mark.parametrize("header", [None, b"Bearer", b"Basic " + KEY.encode(), b"Bearer x", KEY.encode()])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nodes", "/docs", "/openapi.json", "/nothing"])
def test_nothing_but_health_is_shown_without_the_key(server: FakeServer, header: bytes | None, path: str) -> None:
    headers = {} if header is None else {b"Authorization": header}
    answer = httpx.get(server.url + path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_scheme_of_the_key_is_read_in_any_case(server: FakeServer) -> None:
    answer = httpx.get(server.url + "/v1/models", headers={b"Authorization": b"bearer " + KEY.encode()})
    assert answer.status_code == 200


def test_a_wrong_key_is_refused_everywhere_but_at_health(real: RealServer) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": REAL_KEY}):
        assert httpx.get(real.url + "/v1/models", headers=headers).status_code == 401
        assert httpx.post(real.url + "/generate", json={"prompt": "x"}, headers=headers).status_code == 401
        assert httpx.get(real.url + "/health", headers=headers).json()["status"] == "ok"


def test_a_body_over_the_limit_is_refused_announced_or_not(real: RealServer) -> None:
    large = b'{"prompt": "' + b"x" * (3 * 2**20) + b'"}'
    headers = {"Authorization": f"Bearer {REAL_KEY}", "Content-Type": "application/json"}
    assert httpx.post(real.url + "/generate", content=large, headers=headers).status_code == 413

    def drip() -> Iterator[bytes]:
        for start in range(0, len(large), 65536):
            yield large[start : start + 65536]

    assert httpx.post(real.url + "/generate", content=drip(), headers=headers).status_code == 413
