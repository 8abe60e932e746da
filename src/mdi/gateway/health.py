"""How the server is: /health for who restarts it, /health/ready for who sends it requests, /v1/nodes for who looks."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter
from starlette.responses import JSONResponse

from mdi.gateway.streaming import TextEngine

READY_TIMEOUT_S = 10.0
RETRY_AFTER = {"Retry-After": "2"}


def router(engine: TextEngine) -> APIRouter:
    routes = APIRouter()
    readiness = _Readiness(engine)

    @routes.get("/health")
    async def health() -> JSONResponse:
        """200 unless the server has to be started anew. Costs nothing: no node is asked."""
        if engine.error:
            return JSONResponse({"status": "unavailable", "detail": str(engine.error)}, 503)
        status = "recovering" if engine.recovery.recovering else "ok"
        return JSONResponse({"status": status, "model": engine.model_name})

    @routes.get("/health/ready")
    async def ready() -> JSONResponse:
        """200 when a token came through all nodes just now; 503 while lost nodes are brought back, or none comes."""
        if await readiness.asked():
            return JSONResponse({"status": "ready"})
        if engine.error:
            return JSONResponse({"status": "unavailable", "detail": str(engine.error)}, 503)
        status = "recovering" if engine.recovery.recovering else "busy"
        return JSONResponse({"status": status}, 503, RETRY_AFTER)

    @routes.get("/v1/nodes")
    async def nodes() -> JSONResponse:
        """What every node holds and does, in pipeline order, and how often lost ones were brought back."""
        return JSONResponse({"nodes": [asdict(node) for node in engine.nodes()], **asdict(engine.recovery)})

    return routes


class _Readiness:
    """Asks the engine once at a time: whoever comes meanwhile shares the answer, so that asking costs little."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._asking: asyncio.Task[bool] | None = None

    async def asked(self) -> bool:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(asyncio.to_thread(self._engine.ready, READY_TIMEOUT_S))
        return await asyncio.shield(self._asking)
