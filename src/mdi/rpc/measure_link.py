"""Measures the link between two nodes, by exchanges like those of a group: one node listens, the other connects."""

from __future__ import annotations

import logging
import statistics
import threading
import time

import torch

from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.planning.hardware import LinkSpeed
from mdi.rpc.group_join import LinkListener, Member
from mdi.rpc.group_link import GroupLink
from mdi.rpc.tls import Identity

log = logging.getLogger(__name__)
TIMEOUT_S = 30.0
SMALL_VALUES, LARGE_VALUES = 1024, 2**19  # in bfloat16: 2 KiB, 1 MiB
SMALL_TIMES, LARGE_TIMES = 60, 5
WARM_UP = 10
RANKS = Rank(0, 1, 2), Rank(1, 2, 2)


def listen(own: str, peer: str, place: tuple[str, int], identity: Identity | None) -> int:
    """Opens a port for a node that measures, and answers it in a thread, once. Raises LinkError.

    own, peer: ids of the two nodes. place: host and port, as a `LinkListener` takes them.
    """
    listener = LinkListener(identity, *place)

    def answer() -> None:
        try:
            _measure(1, [Member(peer), Member(own)], listener, identity)
        except LinkError as error:
            log.warning("the link to node %s was not measured: %s", peer, error)

    threading.Thread(target=answer, name="mdi-measure-link", daemon=True).start()
    return listener.port


def measure_link(own: str, listening: Member, identity: Identity | None) -> LinkSpeed:
    """Round trip and rate to a node that listens. Takes less than a second, or as long as 5 MiB need both ways.

    Raises LinkError, also when that is more than 30 s.
    """
    return _measure(0, [Member(own), listening], None, identity)


def _measure(index: int, members: list[Member], listener: LinkListener | None, identity: Identity | None) -> LinkSpeed:
    link = GroupLink.join(index, members, RANKS, listener, identity, 0, TIMEOUT_S)
    reason = f"the link is too slow to be measured: 5 MiB take more than {TIMEOUT_S:.0f} s"
    too_long = threading.Timer(TIMEOUT_S, link.close, [reason])
    too_long.start()
    try:
        small_s = _exchanges_s(link, SMALL_VALUES, SMALL_TIMES)
        large_s = _exchanges_s(link, LARGE_VALUES, LARGE_TIMES)
    finally:
        too_long.cancel()
        link.close()
    return LinkSpeed(2 * statistics.median(small_s[WARM_UP:]), 2 * LARGE_VALUES / min(large_s[1:]))


def _exchanges_s(link: GroupLink, n_values: int, times: int) -> list[float]:
    """Seconds of each exchange: half a round trip, as both send at the same time."""
    partials, seconds = torch.zeros(2, 1, n_values, dtype=torch.bfloat16), []
    for _ in range(times):
        began_s = time.perf_counter()
        link.exchange(partials)
        seconds.append(time.perf_counter() - began_s)
    return seconds
