"""The description of a folder of chunks, a JSON file: plan, numeric types, checksums, what they were made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from mdi.checkpoint.fingerprint import SourceFile
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.group import Rank
from mdi.core.quantization import ModelQuantization, UnknownFormatError
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.registry import read_config
from mdi.models.shards import vocabulary_rows
from mdi.planning.plan import VISION, Plan

FILE_NAME = "manifest.json"


def chunk_file(role: str) -> str:
    """The name of a role's chunk in its folder."""
    return f"model_{role}.safetensors"


class ChunkEntry(BaseModel):
    """One chunk file. sha256: of the whole file, hexadecimal. rank: of its stage's group, None where it has none."""

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
    rank: Rank | None = None

    @property
    def spec(self) -> StageSpec:
        return StageSpec(self.first_layer, self.last_layer, self.embedding, self.vision, self.head, self.rank)


class CalibrationEntry(BaseModel):
    """The text that int4 weights were calibrated with. sha256: of its UTF-8, hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str


class Manifest(BaseModel):
    """The contents of a folder of chunks. config, source: the checkpoint's config.json, and its files.

    calibration: None where all weights are rounded to the nearest. left_out: as `Plan` has it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[3] = 3
    model: str
    dtype: str
    quantization: ModelQuantization
    calibration: CalibrationEntry | None = None
    plan_hash: str
    config: dict[str, Any]
    source: tuple[SourceFile, ...]
    chunks: tuple[ChunkEntry, ...]
    left_out: tuple[int, ...] = ()

    @property
    def plan(self) -> Plan:
        specs = {chunk.role: chunk.spec for chunk in self.chunks}
        vision = specs.pop(VISION, None)
        return Plan(tuple(specs.values()), vision, self.left_out)

    @property
    def digest(self) -> str:
        """Identifies plan, numeric types and the bytes of every chunk: what nodes compare (sha256, hexadecimal)."""
        return hashlib.sha256(self.model_dump_json(exclude={"source"}).encode()).hexdigest()

    def chunk(self, file: str) -> ChunkEntry:
        """The entry of a file. Raises CheckpointError when there is none."""
        for chunk in self.chunks:
            if chunk.file == file:
                return chunk
        known = ", ".join(chunk.file for chunk in self.chunks)
        raise CheckpointError(f"{file} is not in its folder's manifest, which has {known}: run `mdi prepare` again")

    def write(self, folder: Path) -> None:
        """Completely or not at all: other processes may write the same file. Leaves one alone that says the same."""
        text, file = self.model_dump_json(indent=2) + "\n", folder / FILE_NAME
        if file.exists() and file.read_bytes() == text.encode():
            return
        unfinished = folder / f".{FILE_NAME}-{uuid4()}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder. Raises CheckpointError when there is none that can be used."""
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
        """A manifest from its JSON. Raises CheckpointError when it is no manifest, or contradicts itself."""
        try:
            manifest = cls.model_validate_json(text)
            plan = manifest.plan
            expected = plan_hash(read_config(manifest.config), plan, manifest.dtype, manifest.quantization)
            named = [chunk.role for chunk in manifest.chunks] == list(plan.roles)
        except UnknownFormatError as error:
            raise CheckpointError(f"is of another version ({error})") from None
        except (ValidationError, ConfigError, CheckpointError):
            expected, named = None, False
        if not named or expected != manifest.plan_hash:
            raise CheckpointError("is damaged or of another version")
        return manifest


def plan_hash(config: ModelConfig, plan: Plan, dtype: str, quantization: ModelQuantization) -> str:
    """The sha256 of model, plan, dtype and quantisation, hexadecimal, equal for all chunks that work together."""
    stages = plan.roles.values()
    cuts = [repr(vocabulary_rows(config, stage.rank)) for stage in stages if stage.rank]
    text = json.dumps([repr(config), [repr(stage) for stage in stages], dtype, repr(quantization), *cuts])
    return hashlib.sha256(text.encode()).hexdigest()
