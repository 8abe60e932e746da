"""A node's place in a group, from its configuration to the end of the epoch."""

from __future__ import annotations

from mdi.core.group import Rank
from mdi.rpc import codec, node_pb2
from mdi.rpc.group_join import LinkListener
from mdi.rpc.group_link import GroupLink
from mdi.rpc.tls import Identity
from mdi.rpc.traffic import Traffic

JOIN_TIMEOUT_S = 60.0  # until the starter has configured the ranks before this one, too


class Membership:
    """Listens for the ranks before this one as soon as it is made. `close` may be called from any thread."""

    def __init__(
        self,
        request: node_pb2.ConfigureRequest,
        rank: Rank,
        place: tuple[str, int],
        identity: Identity | None,
        traffic: Traffic,
    ) -> None:
        """rank: as this node's weights are cut. place: host and port, as a `LinkListener` takes them.

        traffic: counts the bytes of the links.

        Raises LinkError when no port can be bound.
        """
        self._members, self._shares = codec.decode_group(request.group, rank.n_shards)
        self._index, self._epoch, self._identity = request.rank, request.epoch, identity
        self._traffic = traffic
        self._link: GroupLink | None = None
        self._closed = False
        # nobody connects to the first
        self._listener = LinkListener(identity, *place) if request.rank else None

    @property
    def port(self) -> int:
        """Where it listens; 0 where it does not."""
        return self._listener.port if self._listener else 0

    def join(self) -> GroupLink:
        """Waits until all ranks are linked. Raises LinkError, naming one that is missing, or when it is closed."""
        group = self._index, self._members, self._shares
        link = self._link = GroupLink.join(
            *group, self._listener, self._identity, self._epoch, JOIN_TIMEOUT_S, self._traffic
        )
        if self._closed:
            link.close()
        return link

    def close(self) -> None:
        """Ends the links, and whoever waits for them."""
        self._closed = True
        if self._listener:
            self._listener.close()
        if self._link:
            self._link.close()
