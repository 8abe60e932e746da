"""Entries of a checkpoint's JSON files, checked in type and range before they are used."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mdi.core.errors import CheckpointError, invalid

TokenId = Annotated[int, Field(ge=0, le=2**24)]
TokenIds = Annotated[
    list[TokenId] | None, BeforeValidator(lambda ids: ids if ids is None or isinstance(ids, list) else [ids])
]
"""One id or a list of them, as a list."""


class Entries(BaseModel):
    """Entries of exactly the types that transformers accepts. Those that no field names are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def read(cls, content: Any, file: str, part: str = "") -> Self:
        """Checks what a file holds. part: the key that it stands under, for messages.

        Raises CheckpointError, naming the file and the entry, for a wrong type or a value out of range.
        """
        if not isinstance(content, dict):
            raise CheckpointError(f"{file}: {part or 'it'} is not a JSON object: download it again, or mend it")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            where = f"{part}." if part else ""
            raise CheckpointError(f"{file}: {where}{invalid(error.errors())}: download it again, or mend it") from None


def check_ids(entries: Entries, n_tokens: int, file: str, part: str = "") -> None:
    """Raises CheckpointError, naming the entry, for a token id that has no row in an embedding of n_tokens."""
    for name, value in entries:
        if name.endswith("token_id") and value is not None:
            for token_id in value if isinstance(value, list) else [value]:
                if token_id >= n_tokens:
                    where = f"{part}.{name}" if part else name
                    raise CheckpointError(
                        f"{file}: {where} is {token_id}, but the model has {n_tokens} tokens (vocab_size)"
                    )
