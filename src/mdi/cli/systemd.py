"""Units of systemd: what runs, as whom, where it may write, and how a unit's text is quoted (systemd.syntax(7))."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STATE = "mdi"  # folders below /var/lib and /var/cache, or below the user's own
RESTART_S = 2  # a start takes longer than that
STOP_SLACK_S = 15  # beyond the time that running requests have

SANDBOX = {  # of all units. Code that is made at run time (oneDNN) forbids MemoryDenyWriteExecute
    "NoNewPrivileges": "yes",
    "LockPersonality": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "RestrictNamespaces": "yes",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service",
    "SystemCallErrorNumber": "EPERM",
    "UMask": "0077",
}
SYSTEM_SANDBOX = {  # of the system's units: a user's manager may not do this. GPUs forbid PrivateDevices
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "read-only",
    "PrivateTmp": "yes",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectControlGroups": "yes",
    "ProtectProc": "invisible",
}
RAY_FOLDER = Path("/tmp/ray")  # noqa: S108  # by which a program finds the cluster of its machine
LOW_PORT = {"CapabilityBoundingSet": "CAP_NET_BIND_SERVICE", "AmbientCapabilities": "CAP_NET_BIND_SERVICE"}


@dataclass(frozen=True)
class Unit:
    """A service that starts with the machine and always comes back.

    user: that it runs as; None for a unit of a user's own manager, which has fewer means to confine it.
    environment_file: for secrets; it may be missing. writable: folders that it writes to beside its own. stop_s: that
    it may take to end. low_port: it listens at a port below 1024. ray: it is a driver of Ray.
    """

    description: str
    command: Sequence[str]
    user: str | None
    environment: Sequence[str]
    environment_file: Path
    writable: Sequence[Path]
    stop_s: float
    low_port: bool = False
    ray: bool = False

    def text(self) -> str:
        """The unit's file."""
        sections = {
            "Unit": self._unit(),
            "Service": self._service(),
            "Install": {"WantedBy": "multi-user.target" if self.user else "default.target"}.items(),
        }
        return "\n".join(
            f"[{name}]\n" + "".join(f"{key}={value}\n" for key, value in lines) for name, lines in sections.items()
        )

    def _unit(self) -> Iterator[tuple[str, object]]:
        yield "Description", re.sub(r"\s+", " ", self.description).replace("%", "%%")
        if self.user:
            yield from (("Wants", "network-online.target"), ("After", "network-online.target"))
        yield "StartLimitIntervalSec", 0  # a machine that nobody looks at goes on trying

    def _service(self) -> Iterator[tuple[str, object]]:
        yield "Type", "exec"
        if self.user:
            yield "User", self.user
        yield "ExecStart", " ".join(quoted(word, variables=True) for word in self.command)
        for each in self._environment():
            yield "Environment", each
        yield "EnvironmentFile", f"-{str(self.environment_file).replace('%', '%%')}"
        yield from (("StateDirectory", STATE), ("CacheDirectory", STATE), ("WorkingDirectory", f"%S/{STATE}"))
        yield from (("Restart", "always"), ("RestartSec", RESTART_S))
        yield from (("KillMode", "mixed"), ("TimeoutStopSec", f"{self.stop_s + STOP_SLACK_S:g}"))
        yield from (("LimitNOFILE", 65536), ("OOMPolicy", "continue"))  # lost nodes are started again from within
        yield from (SANDBOX | self._system_sandbox()).items()

    def _environment(self) -> Iterator[str]:
        yield from map(quoted, self.environment)
        if self.user:
            yield f"XDG_CACHE_HOME=%C/{STATE}"

    def _system_sandbox(self) -> dict[str, str]:
        if not self.user:
            return {}
        shared = {"PrivateTmp": "no"} if self.ray else {}
        folders = [*self.writable, RAY_FOLDER] if self.ray else self.writable
        writable = " ".join(quoted(f"-{path}") for path in folders)
        paths = {"ReadWritePaths": writable} if writable else {}
        return SYSTEM_SANDBOX | (LOW_PORT if self.low_port else {}) | shared | paths


def quoted(word: str, *, variables: bool = False) -> str:
    """A word as a unit's line has it. variables: the line replaces $NAME, as ExecStart does."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    text = re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)
    if variables:
        text = text.replace("$", "$$")
    return text if re.fullmatch(r"[\w./:=,@%+$-]+", text, re.ASCII) else f'"{text}"'
