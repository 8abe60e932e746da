"""A checkpoint in Hugging Face layout, read lazily: a folder here, or downloaded from the hub. Knows nothing of nodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdi.errors import CheckpointError
from mdi.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
ALIASES = (("model.language_model.", "model."), ("model.visual.", "visual."))  # names inside newer transformers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by its name. Raises CheckpointError for one that is not computed in here."""
    try:
        return DTYPES[name]
    except KeyError:
        raise CheckpointError(f"dtype {name!r} is not supported: use one of {', '.join(DTYPES)}") from None


@dataclass(frozen=True)
class Source:
    """A checkpoint folder. Opening it reads config.json and the tensors' names only.

    config: the parsed config.json.
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Source:
        """Raises CheckpointError when the folder is no checkpoint of a supported architecture."""
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint folder {str(path)!r}")
        source = cls(path, _read_json(path / "config.json"))
        _ = source.model_config, source._files
        return source

    @cached_property
    def model_config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.config)

    def names(self) -> frozenset[str]:
        """Names of all tensors, as on the hub."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        path, stored = self._file(name)
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(stored).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file: only its own bytes are read, and those only when they are used."""
        path, stored = self._file(name)
        with safe_open(path, "pt") as file:
            return file.get_tensor(stored)  # type: ignore[no-any-return]

    def _file(self, name: str) -> tuple[Path, str]:
        try:
            return self._files[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint lacks the tensor {name}; download or convert it again") from None

    @cached_property
    def _files(self) -> dict[str, tuple[Path, str]]:
        """Hub name -> its file, and its name there."""
        if (self.path / INDEX).exists():
            stored = {name: self.path / file for name, file in _read_json(self.path / INDEX)["weight_map"].items()}
        else:
            stored = dict.fromkeys(_names_in(self.path / SINGLE), self.path / SINGLE)
        return {_hub_name(name): (path, name) for name, path in stored.items()}


def locate(
    model: str, *, ckpt_folder: Path, hf_token: str | None = None, download: bool = True
) -> Path:
    """The folder of a checkpoint: `model` itself if it is one, else its download under `ckpt_folder`.

    Downloads show their own progress bars and resume where they stopped. Raises CheckpointError, saying what to do, when
    there is no such checkpoint or no way to get it.
    """
    if Path(model).is_dir():
        return Path(model)
    kept = ckpt_folder / model
    if not download or model.count("/") != 1 or model.startswith((".", "/", "~")):
        if kept.is_dir() and model:
            return kept
        raise CheckpointError(f"there is no checkpoint folder {model!r}; a name on the hub looks like owner/name")
    return _download(model, kept, hf_token)


def _download(model: str, folder: Path, hf_token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        snapshot_download(model, local_dir=folder, token=hf_token, allow_patterns=list(HUB_FILES))
    except GatedRepoError:
        raise CheckpointError(f"{model} is gated: ask for access on its page, then pass --hf-token") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no checkpoint {model!r}, or it is private: check the name, or pass --hf-token") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if (folder / "config.json").exists() and isinstance(error, LocalEntryNotFoundError):
            return folder  # offline, but it was downloaded before
        raise CheckpointError(f"{model} could not be downloaded ({type(error).__name__}): check the connection and try again") from None
    return folder


def _hub_name(name: str) -> str:
    for inside, on_hub in ALIASES:
        if name.startswith(inside):
            return on_hub + name.removeprefix(inside)
    return name


def _names_in(path: Path) -> list[str]:
    if not path.exists():
        legacy = any(path.parent.glob("pytorch_model*.bin"))
        remedy = "convert its pytorch_model.bin to safetensors first" if legacy else "is the download complete?"
        raise CheckpointError(f"{path.parent.name} has no {SINGLE}: {remedy}")
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} is damaged ({error}): download it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent.name} has no {path.name}: it is not a checkpoint in Hugging Face layout") from None
    except (ValueError, TypeError):
        raise CheckpointError(f"{path.name} is not valid JSON: download it again") from None
