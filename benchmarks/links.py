"""What a hop costs: hidden states from one process to another over our link, against bare streams and sockets.

    python -m benchmarks.links                 # 320 decode messages and 40 prefill messages each way
    python -m benchmarks.links --rounds 3      # the short mode
    python -m benchmarks.links --json FILE

Two processes on loopback. A hop begins when the sender has the tensor and ends when the receiver has it; both read the
same clock. One message at a time, all ways in turn, so that what else the machine does meets all of them alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import grpc
import torch
from rich.console import Console
from rich.table import Table
from testing.checkpoints import tiny_config
from testing.own_link import OwnLink

from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.cluster.delivery import Delivery
from mdi.cluster.link import PipelineSettings
from mdi.cluster.node_client import NodeAddress
from mdi.core.batch import Batch, Result, Slice, Token, TokenSampling
from mdi.core.tracing import BusyMeter
from mdi.models.weights import LoadedStage
from mdi.node import server as node_module
from mdi.node.settings import NodeSettings
from mdi.rpc.authority import Authority
from mdi.rpc.channel import channel_credentials, server_credentials
from mdi.rpc.tls import Identity, host_name

T = TypeVar("T")
Hop = Callable[[], float]
WIDTH = 1536  # Qwen2-VL-2B in bfloat16: 3 KiB a token
DECODE_TOKENS, PREFILL_TOKENS = 1, 1707
SEQUENCE_LENGTH = 2048
DECODE_ROUNDS_EACH = 8  # decode messages for every prefill message
GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
LARGEST = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
METHOD = "/bare.Stream/Hop"
STAMP = struct.Struct("<d")
LENGTH = struct.Struct("<I")
OURS, GRPC, TLS, PLAIN = "our link", "gRPC, TLS", "socket, TLS", "socket, plain"
console = Console(width=120)


@dataclass(frozen=True)
class Row:
    """Seconds of a hop: the median, and what a tenth of the hops do not take or take longer than."""

    message: str
    size_bytes: int
    way: str
    fast_s: float
    median_s: float
    slow_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="prefill messages; 8 times as many decode messages")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        asyncio.run(serve(options.peer))
        return
    rows = measure(options.rounds)
    report(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def measure(rounds: int) -> list[Row]:
    """All ways, with both messages."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mdi-links-")))
        authority = Authority.create()
        for name in ("starter", "finisher"):
            (folder / name).mkdir()
            authority.issue(name).save(folder / name)
        rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
        config = tiny_config(
            hidden_size=WIDTH, num_attention_heads=12, num_key_value_heads=2, num_hidden_layers=2, rope_scaling=rope
        )
        path = write_random_checkpoint(folder / "wide", config, dtype="bfloat16")
        prepare(open_source(path), 2)
        ports = _start_peer(folder, stack)
        ways = {
            OURS: stack.enter_context(OurLink(folder, ports[OURS])),
            GRPC: stack.enter_context(BareGrpc(folder, ports[GRPC])),
            TLS: stack.enter_context(BareSocket(ports[TLS], client_context(folder))),
            PLAIN: stack.enter_context(BareSocket(ports[PLAIN], None)),
        }
        return _rows(ways, rounds)


def _start_peer(folder: Path, stack: ExitStack) -> dict[str, int]:
    """The other process; gives its ports."""
    command = [sys.executable, "-m", "benchmarks.links", "--peer", str(folder)]
    peer = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    stack.callback(peer.kill)
    assert peer.stdout
    return dict(json.loads(peer.stdout.readline()))


def _rows(ways: dict[str, Any], rounds: int) -> list[Row]:
    seconds: dict[tuple[str, str], list[float]] = {}
    sizes = {"decode": DECODE_TOKENS, "prefill": PREFILL_TOKENS}
    hidden = {name: torch.randn(n_tokens, WIDTH).to(torch.bfloat16) for name, n_tokens in sizes.items()}
    for number in range(-1, rounds):  # the first round warms up
        for message, repeats in (("decode", DECODE_ROUNDS_EACH), ("prefill", 1)):
            for _ in range(repeats):
                for name, way in ways.items():
                    took_s = way.hop(hidden[message])
                    if number >= 0:
                        seconds.setdefault((message, name), []).append(took_s)
    return [
        Row(message, hidden[message].nbytes, name, _tenth(values, 1), statistics.median(values), _tenth(values, 9))
        for (message, name), values in seconds.items()
    ]


def _tenth(values: list[float], number: int) -> float:
    return sorted(values)[len(values) * number // 10]


class OurLink:
    """The starter's end of our link; the other end is a node whose stage notes the time and computes nothing."""

    def __init__(self, folder: Path, port: int) -> None:
        manifest = Manifest.read(folder / "wide" / "chunks" / "2nodes")
        settings = PipelineSettings(manifest.digest, n_slots=1, sequence_length=SEQUENCE_LENGTH)
        self._inbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        nodes = [NodeAddress("finisher", f"127.0.0.1:{port}")]
        identity = Identity.load(folder / "starter", "starter")
        self._link = OwnLink(nodes, settings, self._inbox.put, identity=identity)

    def __enter__(self) -> OurLink:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def hop(self, hidden: torch.Tensor) -> float:
        """Seconds."""
        positions = torch.arange(len(hidden)).expand(3, -1)
        began_s = time.monotonic()
        self._link.send(Batch(1, (Slice(0, 0, len(hidden), (GREEDY,)),), positions), hidden)
        result = self._inbox.get(timeout=60)
        assert isinstance(result, Result), result
        return result.tokens[0].logprob - began_s


class Arrival:
    """In place of a stage: reports the time at which the batch arrived as a token's probability."""

    def __init__(self, loaded: LoadedStage, **_sizes: int) -> None:
        self.spec = loaded.spec
        self.busy, self.steps, self.step_s = BusyMeter(), 0, 0.0

    def run(self, _batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        self._arrived_s = time.monotonic()
        return hidden

    def sample(self, batch: Batch, _hidden: torch.Tensor) -> Result:
        return Result(batch.id, (Token(0, self._arrived_s),))


class BareGrpc:
    """One stream of grpc.aio over TLS; each message is answered with the time it arrived."""

    def __init__(self, folder: Path, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._call(self._open(Identity.load(folder / "starter", "starter"), port))

    def __enter__(self) -> BareGrpc:
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._channel.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def hop(self, hidden: torch.Tensor) -> float:
        """Seconds."""
        return self._call(self._hop(hidden.view(torch.uint8).numpy().tobytes()))

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _open(self, identity: Identity, port: int) -> None:
        options = (*LARGEST, ("grpc.ssl_target_name_override", host_name("finisher")))
        self._channel = grpc.aio.secure_channel(f"127.0.0.1:{port}", channel_credentials(identity), options=options)
        self._stream = self._channel.stream_stream(METHOD)()

    async def _hop(self, data: bytes) -> float:
        began_s = time.monotonic()
        await self._stream.write(data)
        [arrived_s] = STAMP.unpack(await self._stream.read())
        return float(arrived_s - began_s)


class BareSocket:
    """One TCP connection; each message is its length and its bytes."""

    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = context.wrap_socket(connection) if context else connection

    def __enter__(self) -> BareSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def hop(self, hidden: torch.Tensor) -> float:
        """Seconds."""
        data = hidden.view(torch.uint8).numpy().tobytes()
        began_s = time.monotonic()
        self._socket.sendall(LENGTH.pack(len(data)))
        self._socket.sendall(data)
        [arrived_s] = STAMP.unpack(_exactly(self._socket, STAMP.size))
        return float(arrived_s - began_s)


def client_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _with_certificate(context, folder / "starter", "starter")


def server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _with_certificate(context, folder / "finisher", "finisher")


def _with_certificate(context: ssl.SSLContext, folder: Path, name: str) -> ssl.SSLContext:
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


async def serve(folder: Path) -> None:
    """The other process: all ways' other ends, until standard input ends."""
    identity = Identity.load(folder / "finisher", "finisher")
    ports = {
        OURS: await _serve_ours(folder, identity),
        GRPC: await _serve_grpc(identity),
        TLS: _serve_socket(server_context(folder)),
        PLAIN: _serve_socket(None),
    }
    print(json.dumps(ports), flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def _serve_ours(folder: Path, identity: Identity) -> int:
    patch.object(node_module, "Stage", Arrival).start()
    chunk = folder / "wide" / "chunks" / "2nodes" / "model_finisher.safetensors"
    node = node_module.NodeService(NodeSettings("finisher", chunk, listen="", identity=identity))
    server = node.server()
    port = int(server.add_secure_port("127.0.0.1:0", server_credentials(identity)))
    await server.start()
    node.start(lambda: None)
    KEPT.append(server)
    return port


async def _serve_grpc(identity: Identity) -> int:
    async def hop(messages: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for _ in messages:
            yield STAMP.pack(time.monotonic())

    server = grpc.aio.server(options=LARGEST)
    service, name = METHOD.strip("/").split("/")
    handlers = {name: grpc.stream_stream_rpc_method_handler(hop)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = int(server.add_secure_port("127.0.0.1:0", server_credentials(identity)))
    await server.start()
    KEPT.append(server)
    return port


KEPT: list[object] = []
"""Servers of the other process: they end with the last reference to them."""


def _serve_socket(context: ssl.SSLContext | None) -> int:
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            connection = context.wrap_socket(connection, server_side=True)
        while head := connection.recv(LENGTH.size, socket.MSG_WAITALL if context is None else 0):
            _exactly(connection, *LENGTH.unpack(head))
            connection.sendall(STAMP.pack(time.monotonic()))

    threading.Thread(target=run, daemon=True).start()
    return int(listener.getsockname()[1])


def _exactly(connection: socket.socket, n_bytes: int) -> bytearray:
    data = bytearray(n_bytes)
    view, done = memoryview(data), 0
    while done < n_bytes:
        more = connection.recv_into(view[done:])
        if not more:
            raise ConnectionError("the other process ended")
        done += more
    return data


def report(rows: list[Row]) -> None:
    table = Table("message", "way", "a tenth below", "median", "a tenth above", f"to {GRPC}", f"to {TLS}")
    table.title = "one hop on loopback, ms"
    median_s = {(row.message, row.way): row.median_s for row in rows}
    for row in rows:
        table.add_row(
            f"{row.message}, {row.size_bytes / 1e3:,.0f} kB",
            row.way,
            *(f"{seconds * 1e3:.3f}" for seconds in (row.fast_s, row.median_s, row.slow_s)),
            *(f"{row.median_s / median_s[row.message, way]:.2f}x" for way in (GRPC, TLS)),
        )
    console.print(table)
    more_ms = (median_s["decode", OURS] - median_s["decode", TLS]) * 1e3
    console.print(f"decode: {more_ms:.3f} ms more than the encrypted socket (target: 0.2 ms or less)")
    rate = median_s["prefill", GRPC] / median_s["prefill", OURS]
    console.print(f"prefill: {rate:.2f} of the bare stream's rate (target: 0.7 or more)")


if __name__ == "__main__":
    main()
