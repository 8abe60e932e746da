"""What a folder of chunks says about itself: plan, dtype, checksums. One JSON file; knows no tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mdi.core.errors import CheckpointError, ConfigError
from mdi.models.config import ModelConfig
from mdi.models.weights import StageSpec
from mdi.planning.plan import VISION, Plan

FILE_NAME = "manifest.json"


def chunk_file(role: str) -> str:
    """The name of a role's chunk in its folder."""
    return f"model_{role}.safetensors"


class ChunkEntry(BaseModel):
    """One chunk file. sha256: of the whole file, hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    file: str
    size_bytes: int
    sha256: str
    first_layer: int
    last_layer: int
    embedding: bool
    vision: bool
    head: bool

    @property
    def spec(self) -> StageSpec:
        return StageSpec(self.first_layer, self.last_layer, self.embedding, self.vision, self.head)


class Manifest(BaseModel):
    """A prepared checkpoint. config: the Hugging Face config.json it was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    dtype: str
    plan_hash: str
    config: dict[str, Any]
    chunks: tuple[ChunkEntry, ...]

    @property
    def plan(self) -> Plan:
        specs = {chunk.role: chunk.spec for chunk in self.chunks}
        vision = specs.pop(VISION, None)
        return Plan(tuple(specs.values()), vision)

    @property
    def digest(self) -> str:
        """Identifies plan, dtype and every chunk's bytes: what nodes compare at connect (sha256, hexadecimal)."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def chunk(self, file: str) -> ChunkEntry:
        """The entry of a file. Raises CheckpointError when there is none."""
        for chunk in self.chunks:
            if chunk.file == file:
                return chunk
        known = ", ".join(chunk.file for chunk in self.chunks)
        raise CheckpointError(f"{file} is not in its folder's manifest, which has {known}: run `mdi prepare` again")

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError when there is none, or none that can be used."""
        try:
            return cls.parse((folder / FILE_NAME).read_bytes())
        except FileNotFoundError:
            raise CheckpointError(
                f"there is no {FILE_NAME} in {str(folder)!r}: run `mdi prepare`, and keep its folder together"
            ) from None
        except CheckpointError as error:
            raise CheckpointError(f"{FILE_NAME} in {str(folder)!r} {error}: run `mdi prepare` again") from None

    @classmethod
    def parse(cls, text: str | bytes) -> Manifest:
        """From the file's JSON. Raises CheckpointError when it is no manifest, or contradicts itself."""
        try:
            manifest = cls.model_validate_json(text)
            expected = plan_hash(ModelConfig.from_hf(manifest.config), manifest.plan, manifest.dtype)
        except (ValidationError, ConfigError, KeyError, TypeError):
            expected = None
        if expected is None or expected != manifest.plan_hash:
            raise CheckpointError("is damaged or of another version")
        return manifest


def plan_hash(config: ModelConfig, plan: Plan, dtype: str) -> str:
    """What nodes must agree on to work together: sha256 over model, plan and dtype, hexadecimal."""
    text = json.dumps([repr(config), [repr(stage) for stage in plan.roles.values()], dtype])
    return hashlib.sha256(text.encode()).hexdigest()
