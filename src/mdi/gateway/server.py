"""The HTTP server: binds an address and serves, within limits on connections and on time, until a signal ends it."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from mdi.core.config import GatewayConfig
from mdi.core.errors import ConfigError
from mdi.gateway.app import create_app
from mdi.gateway.connection import REQUEST_TIMEOUT, Connection, ConnectionLimit, Occasionally
from mdi.gateway.engine import TextEngine
from mdi.gateway.keys import read_keys
from mdi.gateway.traces import exporter_to

KEEP_ALIVE_S = 75  # longer than the pools of clients keep idle connections
BACKLOG = 256
FOR_EVER_S = 1e9  # uvicorn takes whole numbers only
SWEEP_S = 0.5
LAST_STALL_S = 3.0  # stall_timeout_s during a shutdown
LAST_EVENTS_S = 2.0  # for sending the errors of requests that the shutdown ended
FAILED_S = 10.0  # that a server whose nodes are lost for good still says so
MOST_OPEN_FILES = 65_536


def serve(engine: TextEngine, bound: socket.socket, config: GatewayConfig = GatewayConfig()) -> None:
    """Serves on a bound socket until SIGINT or SIGTERM, and then until running requests have ended: see `Server`.

    Raises the engine's error, some seconds after it has one: what supervises this process then starts it again.
    """
    print(f"serving {engine.model_name} at {_url(bound, config)}", flush=True)  # noqa: T201
    server = Server(create_app(engine, config), config, failed=lambda: engine.error is not None)
    server.run(sockets=[bound])
    if engine.error:
        raise engine.error


def page_url(bound: socket.socket, config: GatewayConfig) -> str:
    """Where a browser on this machine finds the page."""
    address = ip_address(bound.getsockname()[0])
    loopback = "127.0.0.1" if address.version == 4 else "::1"  # for a server that binds all addresses
    return f"{_url(bound, config, loopback if address.is_unspecified else None)}{config.root_path}/"


def _url(bound: socket.socket, config: GatewayConfig, address: str | None = None) -> str:
    """address: instead of the bound one."""
    own, port = bound.getsockname()[:2]
    address = address or own
    shown = f"[{address}]" if ":" in address else address
    return f"{'https' if config.ssl_certfile else 'http'}://{shown}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """Takes the address before the model is loaded; connections wait until it is. Port 0 picks a free port.

    Raises ConfigError when the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError:
        raise ConfigError(f"the host {host!r} is not known here") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # two sockets may bind the same port as long as neither listens
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"port {port} on {host} cannot be bound ({error.strerror}): choose another with --port"
        ) from None
    return bound


def check_files(config: GatewayConfig) -> None:
    """Raises ConfigError for files of API keys or for HTTPS, or traces, that cannot be, before the model is loaded."""
    if config.otlp_traces_endpoint is not None:
        exporter_to(config.otlp_traces_endpoint).shutdown()
    if config.api_keys_file is not None:
        read_keys(config.api_keys_file)
    if config.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    password = config.ssl_keyfile_password or ""  # with None, OpenSSL asks for one on the terminal
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password)
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except (OSError, ValueError) as error:  # ValueError: a password with other characters
        given = (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)
        files = ", ".join(str(path) for path in given if path)
        raise ConfigError(
            f"no HTTPS with {files} ({error}): name PEM files that fit together, and a password"
        ) from None


def _tls(config: GatewayConfig) -> dict[str, Any]:
    """uvicorn's settings for HTTPS. With authorities for clients, none is served without a certificate."""
    if config.ssl_certfile is None:
        return {}
    return {
        "ssl_certfile": config.ssl_certfile,
        "ssl_keyfile": config.ssl_keyfile,
        "ssl_keyfile_password": config.ssl_keyfile_password,
        "ssl_ca_certs": config.ssl_ca_certs,
        "ssl_cert_reqs": ssl.CERT_NONE if config.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    }


def raise_open_files() -> int:
    """Raises this process's limit on open files as far as it may itself. The limit."""
    soft, hard = (MOST_OPEN_FILES if each == resource.RLIM_INFINITY else each for each in _open_files())
    if soft < (wanted := min(hard, MOST_OPEN_FILES)):
        with suppress(ValueError, OSError):  # some systems allow less than the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, _open_files()[1]))
            return wanted
    return soft


def _open_files() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


class Server(uvicorn.Server):
    """A server that ends connections whose clients only hold them, and drains at the first SIGINT or SIGTERM.

    A shutdown closes what is idle or still being sent. Running requests have `drain_timeout_s` to end; those that
    take longer end with an error. A second signal ends the process at once.

    failed: whether no request can be served any more; such a server ends by itself, after its health could be asked.
    """

    def __init__(self, app: FastAPI, config: GatewayConfig, failed: Callable[[], bool] = lambda: False) -> None:
        self._drain_s = min(config.drain_timeout_s, FOR_EVER_S)
        limit = ConnectionLimit(min(config.max_connections, raise_open_files() // 2))
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(type[Connection], partial(Connection, limit)),  # called as the class would be
                ws="none",
                log_config=None if logging.getLogger().handlers else LOGGING_CONFIG,  # a process may have its own
                log_level=config.uvicorn_log_level,
                access_log=False,
                backlog=BACKLOG,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(self._drain_s + 2 * LAST_EVENTS_S),
                **_tls(config),
            )
        )
        self._limits = config
        self._failed = failed
        self._answers = app.state.answers
        self._stall_s = config.stall_timeout_s
        self._out_of_files = Occasionally()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        await super().startup(sockets)
        self._sweeping = asyncio.create_task(self._sweep())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stall_s = min(self._stall_s, LAST_STALL_S)
        ending = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        ending.cancel()
        self._sweeping.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True

    @property
    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    async def _sweep(self) -> None:
        """Ends connections whose clients are overdue, for as long as the server runs, and a server that failed."""
        failed_s = math.inf
        while True:
            if self._failed():
                failed_s = min(failed_s, time.monotonic())
                self.should_exit |= time.monotonic() - failed_s > FAILED_S
            for connection in self._connections:
                if connection.overdue(self._limits.head_timeout_s, self._stall_s):
                    connection.end(REQUEST_TIMEOUT)
            await asyncio.sleep(SWEEP_S)

    async def _end_requests(self) -> None:
        """Ends requests that are still running when the time for them is over."""
        await asyncio.sleep(self._drain_s)
        self._answers.close()
        await asyncio.sleep(LAST_EVENTS_S)
        for connection in self._connections:
            connection.end()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self._out_of_files.log("no more files can be opened: new connections wait. Raise `ulimit -n`")
        else:
            loop.default_exception_handler(context)
