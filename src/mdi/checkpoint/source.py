"""A checkpoint in Hugging Face layout, read lazily, from a folder or the hub. Knows nothing of nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdi.checkpoint.bundled import BUNDLED, unpack
from mdi.core.errors import CheckpointError
from mdi.models.config import ModelConfig
from mdi.models.weights import LM_HEAD, StageSpec, stage_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
HUB_EXTRAS = ("*/*", "consolidated*")  # the same weights again, in other layouts
ALIASES = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)  # names inside newer transformers
STORED_DTYPES = ("F64", "F32", "BF16", "F16")  # as safetensors calls what can be cast to those


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
        source._check_files()
        source._check_names()
        return source

    @cached_property
    def model_config(self) -> ModelConfig:
        if self.config.get("quantization_config"):
            raise CheckpointError("quantised checkpoints are not supported: use the one they were made from")
        try:
            return ModelConfig.from_hf(self.config)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"config.json lacks an entry or has one of the wrong kind ({error})") from None

    def names(self) -> frozenset[str]:
        """Names of all tensors, as on the hub."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError for a tensor that is not there."""
        return self._header(name)[0]

    def stored_dtype(self, name: str) -> str:
        """How the file keeps it, in safetensors' words: F32, BF16, I8 ..."""
        return self._header(name)[1]

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file: only its own bytes are read, and those only when used."""
        path, stored = self._file(name)
        with _opened(path) as file:
            return file.get_tensor(stored)  # type: ignore[no-any-return]

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        path, stored = self._file(name)
        with _opened(path) as file:
            entry = file.get_slice(stored)
            return tuple(entry.get_shape()), entry.get_dtype()

    def _file(self, name: str) -> tuple[Path, str]:
        try:
            return self._files[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint lacks the tensor {name}: download or convert it again") from None

    @cached_property
    def _files(self) -> dict[str, tuple[Path, str]]:
        """Hub name -> its file, and its name there."""
        if (self.path / INDEX).exists():
            stored = {name: self.path / file for name, file in _weight_map(self.path / INDEX).items()}
        else:
            stored = dict.fromkeys(_names_in(self.path / SINGLE), self.path / SINGLE)
        return {_hub_name(name): (path, name) for name, path in stored.items()}

    def _check_files(self) -> None:
        for path in sorted({path for path, _ in self._files.values()}):
            if not path.is_file():
                raise CheckpointError(f"{self.path.name} lacks {path.name}: is the download complete?")

    def _check_names(self) -> None:
        """A tensor that the architecture does not have means that we would compute another model."""
        config = self.model_config
        whole = StageSpec(0, config.n_layers, embedding=True, vision=True, head=True)
        left_over = sorted(self.names() - set(stage_shapes(config, whole)))
        for name in left_over:
            if not name.endswith("inv_freq") and not (name == LM_HEAD and config.tied_embeddings):
                raise CheckpointError(f"{config.architecture} has no tensor {name}: config.json and weights disagree")


def locate(model: str, *, ckpt_folder: Path, hf_token: str | None = None, download: bool = True) -> Path:
    """The folder of a checkpoint: `model` itself if it is one, else its download under `ckpt_folder`.

    `bundled`, which ships with the package, is copied there. Downloads show their own progress bars and resume where
    they stopped. Raises CheckpointError, saying what to do, when there is no such checkpoint or no way to get it.
    """
    if Path(model).is_dir():
        return Path(model)
    kept = ckpt_folder / model
    if model == BUNDLED:
        return unpack(kept)
    if not download or model.count("/") != 1 or model.startswith((".", "/", "~")):
        if kept.is_dir() and model:
            return kept
        raise CheckpointError(
            f"there is no checkpoint folder {model!r}; a name on the hub looks like owner/name, "
            f"and {BUNDLED!r} ships with MDI-LLM"
        )
    return _download(model, kept, hf_token)


def _download(model: str, folder: Path, hf_token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted, extras = list(HUB_FILES), list(HUB_EXTRAS)
    try:
        snapshot_download(model, local_dir=folder, token=hf_token, allow_patterns=wanted, ignore_patterns=extras)
    except GatedRepoError:
        raise CheckpointError(f"{model} is gated: ask for access on its page, then pass --hf-token") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"the hub has no checkpoint {model!r}, or it is private: check the name, or pass --hf-token"
        ) from None
    except LocalEntryNotFoundError:
        if not (folder / "config.json").exists():
            raise CheckpointError(f"the hub cannot be reached and {model} was not downloaded before") from None
    except Exception as error:  # the hub's own, the HTTP client's, the disk's
        kind = type(error).__name__
        raise CheckpointError(f"{model} could not be downloaded ({kind}): try again, it resumes") from None
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
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A short-lived mapping of a file: tensors read from it keep what they need."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError):
        raise CheckpointError(f"{path.name} is damaged or missing: download or convert it again") from None


def _weight_map(path: Path) -> dict[str, str]:
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path.name} is damaged: download it again")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent.name} has no {path.name}: it is not a checkpoint in Hugging Face layout"
        ) from None
    except (ValueError, TypeError):
        raise CheckpointError(f"{path.name} is not valid JSON: download it again") from None
