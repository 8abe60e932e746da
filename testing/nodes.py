"""Nodes in this process: the real service on a real port, with its event loop in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from mdi.node.server import NodeService
from mdi.node.settings import NodeSettings
from mdi.rpc.channel import add_port


@contextmanager
def node_here(settings: NodeSettings) -> Iterator[str]:
    """Serves one node on a free port of loopback; gives its address."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()

    async def serve() -> None:
        service, stop = NodeService(settings), asyncio.Event()
        server = service.server()
        port = add_port(server, "127.0.0.1:0", settings.identity)
        await server.start()
        service.start(lambda: None)
        started.set_result((asyncio.get_running_loop(), stop, port))
        await stop.wait()
        await server.stop(None)
        await service.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    loop, stop, port = started.result(30)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
