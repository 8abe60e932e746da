"""From a checkpoint's name to its folder: local, bundled with the package, random, or downloaded from the hub."""

from __future__ import annotations

from pathlib import Path

from mdi.checkpoint.bundled import BUNDLED, unpack
from mdi.checkpoint.gguf import gguf_folder
from mdi.checkpoint.gguf_file import PART, SUFFIX
from mdi.checkpoint.random_weights import RANDOM, random_checkpoint
from mdi.core.errors import CheckpointError
from mdi.core.progress import Progress

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
HUB_EXTRAS = ("*/*", "consolidated*")  # the same weights again, in other layouts


def locate(
    model: str,
    *,
    ckpt_folder: Path,
    hf_token: str | None = None,
    mmproj: Path | None = None,
    download: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The folder of a checkpoint: `model` itself if it is one, else its copy or download under `ckpt_folder`.

    A GGUF file has a folder in the cache, see `gguf_folder`; mmproj: the file with its vision tower.
    random:NAME is a random checkpoint in the cache; progress: called with its bytes while it is written.
    Downloads show progress bars and resume where they stopped. Raises CheckpointError, with the remedy, when there is
    no such checkpoint or it cannot be downloaded.
    """
    if model.endswith(SUFFIX) and Path(model).is_file():
        return gguf_folder(Path(model), mmproj)
    if model.endswith(SUFFIX) and not Path(model).exists():
        raise CheckpointError(f"there is no GGUF file {model!r}")
    if mmproj:
        raise CheckpointError(f"--mmproj is the vision tower of a GGUF file, which {model!r} is not: leave it out")
    if Path(model).is_dir():
        return Path(model)
    if model.startswith(RANDOM):
        return random_checkpoint(model.removeprefix(RANDOM), progress)
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


def names(model: str, folder: Path) -> tuple[str, ...]:
    """What a located checkpoint is called: its name without a path first, then as it was named, then its folder."""
    folder_name = folder.resolve().name
    own = PART.sub(r"\1", Path(model).name).removesuffix(SUFFIX)
    return tuple(dict.fromkeys((folder_name if own in ("", "..") else own, model, str(Path(model)), folder_name)))


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
    except Exception as error:  # of the hub's library, the HTTP client or the disk
        kind = type(error).__name__
        raise CheckpointError(f"{model} could not be downloaded ({kind}): try again, it resumes") from None
    return folder
