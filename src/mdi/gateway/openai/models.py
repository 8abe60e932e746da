"""GET /v1/models and GET /v1/models/{name}: the served model under its names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from mdi.core.errors import ModelNotFoundError
from mdi.gateway.engine import TextEngine


class ServedModel:
    """The names of the served model: its own or those given in its place, and those it was started with.

    name: the one that stands in answers.
    """

    def __init__(self, engine: TextEngine, given: Sequence[str]) -> None:
        self._engine = engine
        self.names = tuple(given) or (engine.model_name,)
        self.name = self.names[0]
        self._also = engine.model_names  # may be a path on this machine, so they are not listed
        self._started = int(time.time())

    def check(self, name: str) -> None:
        """Raises ModelNotFoundError for any other name."""
        if name not in self.names and name not in self._also:
            served = " or ".join(map(repr, self.names))
            raise ModelNotFoundError(f"the model {name!r} is not served here: ask for {served}", "model")

    def described(self, name: str) -> dict[str, Any]:
        """OpenAI's fields, vLLM's (root, max_model_len), and what the model reads and can do."""
        can = self._engine.capabilities
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "mdi",
            "root": self._engine.model_name,
            "max_model_len": can.max_model_len,
            "modalities": can.modalities,
            "capabilities": self._abilities(),
        }

    def _abilities(self) -> list[str]:
        """In Ollama's words."""
        can = self._engine.capabilities
        optional = {"vision": "image" in can.modalities, "thinking": can.reasoning is not None}
        return ["completion", "tools", *(ability for ability, has in optional.items() if has)]


def router(served: ServedModel) -> APIRouter:
    routes = APIRouter()

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(map(served.described, served.names))}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check(name)
        return served.described(name)

    return routes
