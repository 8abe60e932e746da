"""Which versions of the protocol understand each other, and which side is upgraded otherwise."""

from __future__ import annotations

import pytest

from mdi.rpc.version import HERE, Protocol, disagreement


@pytest.mark.parametrize(
    ("node", "server", "upgraded"),
    [
        (HERE, HERE, None),
        (Protocol(11, 10), Protocol(10, 10), None),
        (Protocol(10, 10), Protocol(11, 9), None),
        (Protocol(12, 11), Protocol(10, 8), "server"),
        (Protocol(9, 8), Protocol(11, 10), "node"),
        (Protocol.of(9, 0), Protocol.of(10, 0), "node"),
        (Protocol.of(11, 0), Protocol.of(10, 0), "server"),
    ],
)
def test_the_older_side_is_upgraded_unless_the_newer_one_understands_it(
    node: Protocol, server: Protocol, upgraded: str | None
) -> None:
    said = disagreement(node, server)
    assert said.endswith(f"upgrade mdi on the {upgraded}'s machine") if upgraded else said == ""
