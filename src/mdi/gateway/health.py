"""How the server is: /health, /ping, /health/ready, /load, /version, /v1/nodes and /metrics."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Protocol

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from mdi import __version__
from mdi.gateway.engine import TextEngine
from mdi.gateway.metrics import CONTENT_TYPE, Metrics
from mdi.gateway.nodes import Report, report

READY_TIMEOUT_S = 10.0
RETRY_AFTER = {"Retry-After": "2"}


class Replicas(Protocol):
    """All replicas of a server, of which this process is one. name: its own."""

    @property
    def name(self) -> str: ...
    async def nodes(self) -> Report: ...
    async def metrics(self) -> str: ...


def router(engine: TextEngine, metrics: Metrics, replicas: Replicas | None = None) -> APIRouter:
    """replicas: where there are several."""
    routes = APIRouter()
    readiness = _Readiness(engine)

    @routes.get("/health")
    async def health() -> JSONResponse:
        """200 unless the server must be restarted. Computes nothing and calls no node."""
        return _failed(engine) or JSONResponse({"status": _status(engine, "ok"), "model": engine.model_name})

    @routes.get("/ping")
    @routes.post("/ping", operation_id="ping")
    async def ping() -> JSONResponse:
        """The same, under the path that Amazon SageMaker asks."""
        return await health()

    @routes.get("/load")
    async def load() -> JSONResponse:
        """How many requests there are, as in vLLM, and how many of them are being computed and wait."""
        now = engine.load
        return JSONResponse({"server_load": now.running + now.waiting, **asdict(now)})

    @routes.get("/version")
    async def version() -> JSONResponse:
        """The version of this server."""
        return JSONResponse({"version": __version__})

    @routes.get("/health/ready")
    async def ready() -> JSONResponse:
        """200 when a token has just passed through all nodes; 503 while lost nodes are replaced, or no token comes."""
        if await readiness.check():
            return JSONResponse({"status": "ready"})
        return _failed(engine) or JSONResponse({"status": _status(engine, "busy")}, 503, RETRY_AFTER)

    @routes.get("/v1/nodes")
    async def nodes() -> JSONResponse:
        """The machines: what every node holds and does, the plan and its reason, requests, and recovery.

        On a Ray cluster with several replicas, each node names its `replica`, and the counts are of all of them.
        """
        return JSONResponse(await replicas.nodes() if replicas else report(engine, metrics))

    @routes.get("/metrics", include_in_schema=False)
    async def series() -> Response:
        """What requests and nodes do, as Prometheus reads it; of all replicas, by their names in `engine`."""
        return Response(await replicas.metrics() if replicas else metrics.text(), media_type=CONTENT_TYPE)

    return routes


def _failed(engine: TextEngine) -> JSONResponse | None:
    """The answer of an engine that serves no more requests; None while it does."""
    return JSONResponse({"status": "unavailable", "detail": str(engine.error)}, 503) if engine.error else None


def _status(engine: TextEngine, otherwise: str) -> str:
    return "recovering" if engine.recovery.recovering else otherwise


class _Readiness:
    """The engine's readiness, checked once at a time: requests that come during a check share its result."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._check: asyncio.Task[bool] | None = None

    async def check(self) -> bool:
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(asyncio.to_thread(self._engine.ready, READY_TIMEOUT_S))
        return await asyncio.shield(self._check)
