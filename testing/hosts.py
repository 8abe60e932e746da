"""Hosts in network namespaces: cables to one switch, faults of the cables, and a capture of all frames.

Linux only, as root, with iproute2. Every host is a network namespace with one interface, eth0, and an address in
10.77.0.0/24. The switch is a bridge in another namespace; its port to a host has the host's name. The machine's own
network does not change.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import itertools
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PREFIX = "mdi"
NAMESPACES = Path("/run/netns")
LARGEST_FRAME = 2**17  # the kernel joins segments on virtual cables
LIBC = ctypes.CDLL(None, use_errno=True)

# from linux/sched.h, asm/socket.h, linux/if_ether.h, linux/if_packet.h
CLONE_NEWNET = 0x40000000
SO_RCVBUFFORCE = 33
ETH_P_ALL, ETH_P_IP = 0x0003, 0x0800
SOL_PACKET, PACKET_STATISTICS, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 6, 15, 23

Flow = tuple[bytes, bytes]
"""One direction of a connection: addresses, ports."""


def why_not() -> str | None:
    """The reason why this machine cannot have such hosts, or None."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    try:
        with Network("probe") as network, network.hosts["probe"].inside():
            pass
    except (subprocess.CalledProcessError, OSError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"network namespaces are not permitted here ({said.strip()})"
    return None


class Network:
    """A switch with one cable to each named host. At the end of the context, all processes in it are killed."""

    def __init__(self, *names: str) -> None:
        _sweep()
        self._undo = ExitStack()
        try:
            self._switch = self._namespace("switch")
            _ip("-n", self._switch, "link", "add", "name", "lan", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "dev", "lan", "up")
            self.hosts = {name: self._host(name, f"10.77.0.{number}") for number, name in enumerate(names, start=1)}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Safe to call twice."""
        self._undo.close()

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """A capture of what passes the switch during the context."""
        capture = Capture(self._switch)
        try:
            yield capture
        finally:
            capture.close()

    def _namespace(self, name: str) -> str:
        namespace = f"{PREFIX}-{os.getpid()}-{name}"
        _ip("netns", "add", namespace)
        self._undo.callback(_remove, namespace)
        _ip("-n", namespace, "link", "set", "dev", "lo", "up")
        return namespace

    def _host(self, name: str, address: str) -> Host:
        host = Host(name, address, self._namespace(name), self._switch)
        cable = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("-n", self._switch, "link", "add", "name", name, *cable)
        _ip("-n", self._switch, "link", "set", "dev", name, "master", "lan", "up")
        _ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "dev", "eth0", "up")
        return host


@dataclass(frozen=True)
class Host:
    """A host and its cable. address: IPv4. namespace: the host's. switch: the namespace at the cable's other end."""

    name: str
    address: str
    namespace: str
    switch: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets and processes that this thread makes in the context belong to the host."""
        with _inside(self.namespace):
            yield

    def cut(self) -> None:
        """Takes the cable out."""
        _ip("-n", self.switch, "link", "set", "dev", self.name, "down")

    def heal(self) -> None:
        """Puts the cable back."""
        _ip("-n", self.switch, "link", "set", "dev", self.name, "up")

    @contextmanager
    def throttled(self, rate: str) -> Iterator[None]:
        """Limits the cable's rate in both directions. rate: as tc has it, such as "4mbit"."""
        ends = ((self.namespace, "eth0"), (self.switch, self.name))
        limit = ("tbf", "rate", rate, "burst", "32kb", "latency", "300ms")
        for namespace, device in ends:
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *limit)
        try:
            yield
        finally:
            for namespace, device in ends:
                _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")

    @contextmanager
    def worn(self, *, delay_s: float, loss: float) -> Iterator[None]:
        """Delays every frame on the cable, and drops this share of them: a forwarder stands between port and switch."""
        _ip("-n", self.switch, "link", "add", "name", "worn0", "type", "veth", "peer", "name", "worn1")
        try:
            _ip("-n", self.switch, "link", "set", "dev", "worn0", "up")
            _ip("-n", self.switch, "link", "set", "dev", self.name, "nomaster")
            _ip("-n", self.switch, "link", "set", "dev", "worn1", "master", "lan", "up")
            forwarder = Forwarder(self.switch, (self.name, "worn0"), delay_s, loss)
            try:
                yield
            finally:
                forwarder.close()
        finally:
            _ip("-n", self.switch, "link", "del", "dev", "worn0")
            _ip("-n", self.switch, "link", "set", "dev", self.name, "master", "lan")


class Forwarder:
    """Passes frames between two interfaces, delays them and drops some. Kernels without netem need it."""

    def __init__(self, namespace: str, devices: tuple[str, str], delay_s: float, loss: float) -> None:
        self._delay_s = delay_s
        self._loss = loss
        self._random = random.Random(0)
        with _inside(namespace):
            self._ends = [_packet_socket(device) for device in devices]
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stop.close()
        self._thread.join()
        for end in (*self._ends, self._stopped):
            end.close()

    def _run(self) -> None:
        late: list[tuple[float, int, socket.socket, bytes]] = []
        numbers = itertools.count()
        across = dict(zip(self._ends, reversed(self._ends), strict=True))
        while True:
            wait_s = max(0.0, late[0][0] - time.monotonic()) if late else None
            ready, _, _ = select.select([*self._ends, self._stopped], [], [], wait_s)
            if self._stopped in ready:
                return
            for end in ready:
                frame = end.recv(LARGEST_FRAME)
                if self._random.random() >= self._loss:
                    heapq.heappush(late, (time.monotonic() + self._delay_s, next(numbers), across[end], frame))
            while late and late[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(late)
                with contextlib.suppress(OSError):  # the cable is cut, or the frame is too long: it is lost
                    end.send(frame)


class Capture:
    """All frames that enter the switch until `close`."""

    def __init__(self, namespace: str) -> None:
        with _inside(namespace):
            self._socket = _packet_socket(None)
        self._frames: list[bytes] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Ends the capture. Raises AssertionError when it missed frames."""
        time.sleep(0.1)  # for frames that were just sent
        self._closing = True
        self._thread.join()
        _, missed = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._socket.close()
        assert missed == 0, f"{missed} frames were not captured"

    def shows(self, secret: bytes) -> bool:
        """Whether these bytes passed: in one connection, over any number of packets, or in one packet."""
        return any(secret in passed for passed in (*self.streams(), *self._frames))

    def streams(self) -> list[bytes]:
        """The bytes of each direction of each TCP connection, in order and without repetitions."""
        flows: dict[Flow, list[tuple[int, bytes]]] = defaultdict(list)
        for frame in self._frames:
            if segment := _segment(frame):
                flow, position, data = segment
                flows[flow].append((position, data))
        return [_joined(segments) for segments in flows.values()]

    _closing = False

    def _run(self) -> None:
        self._socket.settimeout(0.05)
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                self._frames.append(self._socket.recv(LARGEST_FRAME))


def _segment(frame: bytes) -> tuple[Flow, int, bytes] | None:
    """Direction, sequence number and data of a TCP segment over IPv4 over Ethernet (RFC 791, RFC 9293)."""
    if int.from_bytes(frame[12:14]) != ETH_P_IP or frame[23] != socket.IPPROTO_TCP:
        return None
    packet = frame[14:]
    tcp = packet[(packet[0] & 15) * 4 : int.from_bytes(packet[2:4])]
    data = tcp[(tcp[12] >> 4) * 4 :]
    return ((packet[12:20], tcp[:4]), int.from_bytes(tcp[4:8]), data) if data else None


def _joined(segments: list[tuple[int, bytes]]) -> bytes:
    first, _ = segments[0]
    data, end = bytearray(), -(2**31)
    # sequence numbers wrap around
    placed = sorted(((position - first + 2**31) % 2**32 - 2**31, part) for position, part in segments)
    for position, part in placed:
        data += part[max(0, end - position) :]
        end = max(end, position + len(part))
    return bytes(data)


def _packet_socket(device: str | None) -> socket.socket:
    """A socket for the frames that a device receives, or all devices of this namespace; it sends them unchanged."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0 if device else socket.htons(ETH_P_ALL))
    made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2**26)  # so that no frame is missed
    made.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    if device:
        made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)  # checksums and joined segments are left as they are
        made.bind((device, ETH_P_ALL))
    return made


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Moves this thread to another network namespace for the context."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _enter(str(NAMESPACES / namespace))
        try:
            yield
        finally:
            _enter(f"/proc/self/fd/{home}")
    finally:
        os.close(home)


def _enter(path: str) -> None:
    there = os.open(path, os.O_RDONLY)
    try:
        if LIBC.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(there)


def _sweep() -> None:
    """Removes namespaces of test runs that were killed."""
    for path in NAMESPACES.glob(f"{PREFIX}-*-*"):
        owner = path.name.split("-")[1]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            _remove(path.name)


def _remove(namespace: str) -> None:
    """Removes a namespace and kills all processes in it."""
    for pid in map(int, _ip("netns", "pids", namespace).split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _ip("netns", "delete", namespace)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
