"""The version of what crosses the network, and whether two sides understand each other. No sockets.

It is not the version of the package: releases whose messages mean the same have the same one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """What one side speaks. version: raised with every change of messages. oldest: that it still understands."""

    version: int
    oldest: int

    @classmethod
    def of(cls, version: int, oldest: int) -> Protocol:
        """As a message has it; one that names no `oldest` understands its own alone."""
        return cls(version, oldest or version)


HERE = Protocol(version=15, oldest=15)
IN_GROUP = Protocol(HERE.version, HERE.version)  # ranks of a group compute in lockstep: all speak the same


def disagreement(node: Protocol, server: Protocol) -> str:
    """Which side is to be upgraded; empty when they understand each other."""
    if node.version < server.oldest:
        return (
            f"the node there is of an older version of mdi than the server (it speaks protocol {node.version}, the "
            f"server {server.oldest} or newer): upgrade mdi on the node's machine"
        )
    if server.version < node.oldest:
        return (
            f"the node there is of a newer version of mdi than the server (it speaks protocol {node.oldest} or newer, "
            f"the server {server.version}): upgrade mdi on the server's machine"
        )
    return ""
