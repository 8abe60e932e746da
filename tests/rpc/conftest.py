"""An authority, a stranger's authority, and identities of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from testing.links import fake_node

from mdi.rpc import authority as certs
from mdi.rpc.authority import Authority
from mdi.rpc.tls import Identity


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="session")
def stranger() -> Authority:
    return Authority.create()


@pytest.fixture(scope="session")
def starter(authority: Authority) -> Identity:
    return authority.issue("starter")


@pytest.fixture(scope="session")
def finisher(authority: Authority) -> Identity:
    return authority.issue("finisher", ["127.0.0.1", "localhost", "::1"])


@pytest.fixture(scope="session")
def server(finisher: Identity) -> Iterator[str]:
    with fake_node(finisher) as address:
        yield address


@pytest.fixture(scope="session")
def outdated() -> Callable[[Authority, str], Identity]:
    """Issues a certificate that ended a minute ago."""

    def issue(authority: Authority, node: str) -> Identity:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certs, "_ends", lambda days: datetime.now(UTC) - timedelta(minutes=1))
            return authority.issue(node)

    return issue
