"""The fields that the requests of all routes share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from fastapi import HTTPException
from pydantic import BaseModel, Field, GetJsonSchemaHandler, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mdi.core.errors import InputError, invalid
from mdi.core.sampling import Flag, SamplingParams, Whole

NOT_JSON = "send the body as JSON, with Content-Type: application/json"
NOT_AN_OBJECT = "the body must be a JSON object, sent with Content-Type: application/json"

Effort = Annotated[str, Field(pattern="^[A-Za-z0-9_ .:+-]{0,64}$")]
"""A word for the chat template: see `core.template_settings.WORD`."""

PixelCount = Annotated[int, Field(strict=True, ge=1, le=2**53), Whole]


class Body(BaseModel):
    """The JSON body of a request. Raises InputError, naming the field, for what is none."""

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, body: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(body)
        except ValidationError as error:
            raise invalid(error.errors()) from None

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, body: Any) -> dict[str, Any]:
        """Null stands for the default."""
        if isinstance(body, bytes):  # FastAPI parses no other type than JSON
            raise HTTPException(415, NOT_JSON)
        if not isinstance(body, dict):
            raise InputError(NOT_AN_OBJECT)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in body.items() if value is not None or name not in known}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Every field that is not required may be null."""
        schema = handler(core)
        described = handler.resolve_ref_schema(schema)
        for name, field in described["properties"].items():
            if name not in described.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                described["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return schema


class GatewayRequest(Body, SamplingParams):
    """Sampling settings, limits on the area of images and frames, and whether to stream the answer."""

    prompt_logprobs: ClassVar[None] = None  # type: ignore[misc]  # no field of requests: see `echo`
    min_pixels: PixelCount | None = None
    max_pixels: PixelCount | None = None
    stream: Flag | None = None

    def params(self, **changes: Any) -> SamplingParams:
        return SamplingParams(**{name: getattr(self, name) for name in SamplingParams.model_fields} | changes)
