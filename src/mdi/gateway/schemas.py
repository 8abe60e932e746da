"""The fields that the requests of all routes share."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from pydantic import model_validator

from mdi.core.errors import InputError
from mdi.core.sampling import Integer, SamplingParams

NOT_JSON = "send the body as JSON, with Content-Type: application/json"
NOT_AN_OBJECT = "the body must be a JSON object, sent with Content-Type: application/json"

DEFAULT_FOR_NULL = {name for name, field in SamplingParams.model_fields.items() if field.default is not None} | {
    "logprobs"
}
"""Fields where null stands for the default."""


class GatewayRequest(SamplingParams):
    """Sampling settings, limits on the area of images and frames, and whether to stream the answer."""

    min_pixels: Integer | None = None
    max_pixels: Integer | None = None
    stream: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, body: Any) -> dict[str, Any]:
        if isinstance(body, bytes):  # FastAPI parses no other type than JSON
            raise HTTPException(415, NOT_JSON)
        if not isinstance(body, dict):
            raise InputError(NOT_AN_OBJECT)
        return {name: value for name, value in body.items() if value is not None or name not in DEFAULT_FOR_NULL}

    def params(self, **changes: Any) -> SamplingParams:
        return SamplingParams(**{name: getattr(self, name) for name in SamplingParams.model_fields} | changes)
