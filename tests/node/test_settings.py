"""Where a node listens for its group."""

from __future__ import annotations

import pytest

from mdi.node.settings import NodeSettings


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("10.0.0.2:5000", ("10.0.0.2", 5001)),
        ("[::]:5000", ("[::]", 5001)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("10.0.0.2:65535", ("10.0.0.2", 0)),
    ],
)
def test_a_group_meets_at_the_port_after_the_nodes_own(listen: str, expected: tuple[str, int]) -> None:
    assert NodeSettings("secondary0", None, listen).link_place == expected
