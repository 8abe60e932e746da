"""Nodes in this process, for tests: the real service on a real port, with its event loop in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from mdi.node.server import NodeService
from mdi.node.settings import NodeSettings
from mdi.rpc.channel import add_port


@contextmanager
def node_here(settings: NodeSettings) -> Iterator[str]:
    """Serves one node on a free port of loopback; gives its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[NodeService, grpc.aio.Server, int]:
        service = NodeService(settings)
        server = service.server()
        port = add_port(server, "127.0.0.1:0", settings.identity)
        await server.start()
        service.start(lambda: None)
        return service, server, port

    async def stop() -> None:
        await server.stop(None)
        await service.stop()

    try:
        service, server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        yield f"127.0.0.1:{port}"
        asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
