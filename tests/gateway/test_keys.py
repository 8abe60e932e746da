"""API keys: files of them, their limits and expiry, and what their holders are answered."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from testing.fakes import HOLD, FakeEngine, piece

from mdi.core.config import GatewayConfig
from mdi.core.errors import ConfigError
from mdi.gateway import keys as keys_module
from mdi.gateway.keys import DAY_S, Account, Key, Keys, has_expired, read_keys
from tests.gateway.conftest import CHAT, LONG_WAIT_S, FakeServer, serving

ALICE, BOB = "sk-alice", "sk-bob"
FILE = f"""
alice: {{key: {ALICE}}}
bob:
  sha256: {sha256(BOB.encode()).hexdigest()}
  requests_per_minute: 2
  expires: 2099-01-01
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    return path


def ask(server: FakeServer, key: str | None, **headers: str) -> httpx.Response:
    given = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(
        f"{server.url}/v1/chat/completions", json=CHAT, headers=given | headers, verify=False, timeout=LONG_WAIT_S
    )


def rewrite(path: Path, content: str) -> None:
    """Another file in its place, as editors and Kubernetes write one."""
    path.with_suffix(".new").write_text(content)
    path.with_suffix(".new").replace(path)


def test_each_of_several_keys_opens_the_server(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenAI's clients send it, or Anthropic's."""
    with serving(FakeEngine(), GatewayConfig(api_keys=("one", "zwei"), api_keys_file=file)) as server:
        for key in ("one", ALICE, BOB):
            assert ask(server, key).status_code == 200
            assert ask(server, None, **{"x-api-key": key}).status_code == 200
        assert ask(server, None, **{b"x-api-key".decode(): "zwei"}).status_code == 200
        for wrong in ("alice", "", sha256(BOB.encode()).hexdigest(), "key-1"):
            refused = ask(server, wrong)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"


def test_a_file_is_reread_when_it_changes(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is broken, or gone, keeps the keys as they were, and is logged once."""
    monkeypatch.setattr(keys_module, "CHECK_EVERY_S", 0.0)
    with serving(FakeEngine(), GatewayConfig(api_keys_file=file)) as server:
        assert ask(server, ALICE).status_code == 200
        rewrite(file, "carol: {key: sk-carol}")
        assert ask(server, "sk-carol").status_code == 200
        assert ask(server, ALICE).status_code == 401
        rewrite(file, "carol: {key: ")
        for _ in range(2):
            assert ask(server, "sk-carol").status_code == 200
        file.unlink()
        assert ask(server, "sk-carol").status_code == 200
        rewrite(file, FILE)
        assert ask(server, ALICE).status_code == 200
        assert ask(server, "sk-carol").status_code == 401
    messages = [entry.message for entry in caplog.records if entry.levelno == logging.ERROR]
    assert ["is not valid YAML" in messages[0], "cannot be read" in messages[1]] == [True, True]
    assert len(messages) == 2
    assert "sk-carol" not in caplog.text


def test_a_key_with_too_many_requests_waits_and_others_do_not(file: Path) -> None:
    with serving(FakeEngine(), GatewayConfig(api_keys_file=file)) as server:
        assert [ask(server, BOB).status_code for _ in range(3)] == [200, 200, 429]
        refused = ask(server, BOB)
        assert refused.json()["error"]["message"] == "the key bob may send 2 requests a minute"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 25 <= int(refused.headers["retry-after"]) <= 31
        assert ask(server, ALICE).status_code == 200
        listed = httpx.get(f"{server.url}/v1/models", headers={"x-api-key": BOB}, verify=False, timeout=LONG_WAIT_S)
        assert listed.status_code == 200  # computes nothing


def test_the_running_requests_and_tokens_of_a_key_are_counted(tmp_path: Path) -> None:
    """A client that leaves in the middle ends its request, and what was computed counts."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"a": {"key": "k", "running_requests": 1, "tokens_per_day": 20}}))
    with serving(FakeEngine(), GatewayConfig(api_keys_file=path)) as server:
        server.engine.says(piece("a"), piece("b"), HOLD, piece("c", "stop"))
        headers = {"x-api-key": "k"}
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=CHAT | {"stream": True}, headers=headers, timeout=LONG_WAIT_S) as running:
            lines = running.iter_lines()  # whose end would be that of the connection
            next(lines)
            refused = ask(server, "k")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "1 requests running at once" in refused.text
        assert server.engine.requests[0].cancelled.wait(20)  # 7 tokens of the prompt, 2 of the answer
        server.engine.says(*(piece("x") for _ in range(3)), piece("y", "stop"))
        while (answer := ask(server, "k")).status_code == 429:
            assert "at once" in answer.text
        assert answer.status_code == 200  # 20 tokens now
        refused = ask(server, "k")
        assert refused.status_code == 429
        assert "has used its 20 tokens of today" in refused.text
        assert 0 < int(refused.headers["retry-after"]) <= DAY_S


def test_an_expired_key_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("old: {key: k, expires: 2020-01-31}")
    with serving(FakeEngine(), GatewayConfig(api_keys_file=path)) as server:
        refused = ask(server, "k")
        assert refused.status_code == 401
        assert refused.json()["error"]["message"] == "the key old expired at 2020-01-31 00:00 UTC"
        assert httpx.get(f"{server.url}/health", verify=False, timeout=LONG_WAIT_S).status_code == 200


@pytest.mark.parametrize(
    "written", ["2027-01-31", '"2027-01-31"', "2027-01-31T00:00:00Z", '"2027-01-31T01:00:00+01:00"']
)
def test_an_expiry_is_a_date_or_a_time_in_utc_unless_it_says_otherwise(tmp_path: Path, written: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"a: {{key: k, expires: {written}}}")
    (key,) = read_keys(path)
    moment = datetime(2027, 1, 31, tzinfo=UTC).timestamp()
    assert [has_expired(key, moment - 1), has_expired(key, moment)] == [False, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no API keys"),
        ("- a", "has no API keys"),
        ("a: sk-secret", "a is not an object with key or sha256"),
        ("a: {}", "a: a key needs either key or sha256"),
        ("a: {key: sk-secret, sha256: " + "f" * 64 + "}", "a: a key needs either key or sha256"),
        ("a: {key: ''}", "a: key: String should have at least 1 character"),
        ("a: {key: 12345}", "a: key should be a valid string"),
        ("a: {sha256: sk-secret}", "a: sha256: String should match pattern"),
        ("a: {key: sk-secret, limit: 3}", "a: unknown field limit"),
        ("a: {key: sk-secret, tokens_per_day: 0}", "a: tokens_per_day should be greater than or equal to 1"),
        ("a: {key: sk-secret, running_requests: many}", "a: running_requests should be a valid integer"),
        ("a: {key: sk-secret, expires: 2027}", "a: expires must be a date like 2027-01-31"),
        ("a: {key: sk-secret, expires: soon}", "a: expires: "),
        ("a: {key: sk-secret, expires: 2027-02-30}", "is not valid YAML"),
        ('"a b": {key: sk-secret}', "a b: name: a name of a key has up to 64 letters"),
        ("a: {key: sk-secret}\nb: {key: sk-secret}", "a and b have the same key"),
        ("a: {key: sk-secret", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_the_keys(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        Keys((), path)
    assert message in str(refused.value)
    assert "sk-secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys((), tmp_path / "none.yaml")


def test_a_minute_s_requests_may_come_at_once_and_wear_off_evenly() -> None:
    key, account = Key(name="a", key="k", requests_per_minute=6), Account()

    def begun(now: float) -> Any:
        refusal = account.begin(key, now)
        return refusal and refusal.retry_after_s

    assert [begun(1000.0) for _ in range(6)] == [None] * 6
    assert begun(1000.0) == 11
    assert [begun(1009.9), begun(1010.1), begun(1010.1)] == [1, None, 10]
    assert [begun(2000.0) for _ in range(7)] == [None] * 6 + [11]


def test_the_tokens_of_a_day_are_free_again_at_midnight() -> None:
    key, account = Key(name="a", key="k", tokens_per_day=10), Account()
    assert account.begin(key, DAY_S - 100) is None
    account.end(10, DAY_S - 90)
    refusal = account.begin(key, DAY_S - 80)
    assert refusal is not None
    assert refusal.retry_after_s == 81
    assert account.begin(key, DAY_S + 1) is None
    assert account.running == 1


def test_the_state_of_limits_outlives_a_change_of_the_file(file: Path) -> None:
    now = 1_000_000.0
    keys = Keys((), file, clock=lambda: now)
    bob = asyncio.run(keys.find(BOB.encode()))
    assert bob is not None
    assert [keys.account(bob).begin(bob, now) for _ in range(2)] == [None, None]
    rewrite(file, FILE.replace("minute: 2", "minute: 3"))
    now += 2
    bob = asyncio.run(keys.find(BOB.encode()))
    assert bob is not None
    assert bob.requests_per_minute == 3
    assert keys.account(bob).begin(bob, now) is None
    assert keys.account(bob).begin(bob, now) is not None
