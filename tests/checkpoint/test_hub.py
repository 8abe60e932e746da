"""From a name to a folder: what the hub answers is translated; the network is not touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils._paths import filter_repo_objects
from testing.checkpoints import tiny_config

from mdi.checkpoint.hub import locate
from mdi.core.errors import CheckpointError


class Hub:
    """Stands for snapshot_download: answers as told and keeps what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, repo: str, **options: Any) -> str:
        self.asked.append((repo, options))
        if self.error:
            raise self.error
        Path(options["local_dir"]).mkdir(parents=True)
        return str(options["local_dir"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def http_error(kind: type[errors.HfHubHTTPError]) -> Exception:
    """One of the hub's errors, without the response it normally carries."""
    error = kind.__new__(kind)
    Exception.__init__(error, "https://hub.example/secret-detail")
    return error


def test_a_local_folder_is_taken_as_it_is(tiny: Path, hub: Hub, tmp_path: Path) -> None:
    assert locate(str(tiny), ckpt_folder=tmp_path) == tiny
    assert not hub.asked


def test_a_hub_name_is_downloaded_into_its_own_folder(hub: Hub, tmp_path: Path) -> None:
    found = locate("Qwen/Qwen2-VL-2B-Instruct", ckpt_folder=tmp_path, hf_token="hf_secret")
    [(repo, options)] = hub.asked
    assert found == tmp_path / "Qwen" / "Qwen2-VL-2B-Instruct" == options["local_dir"]
    assert (repo, options["token"]) == ("Qwen/Qwen2-VL-2B-Instruct", "hf_secret")


def test_a_download_takes_weights_and_tokenizer_and_no_pickles(hub: Hub, tmp_path: Path) -> None:
    locate("owner/name", ckpt_folder=tmp_path)
    [(_, options)] = hub.asked
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "merges.txt",
        "chat_template.jinja",
        "pytorch_model.bin",
        "model.ckpt.index",
        "original/consolidated.00.safetensors",
        "consolidated.safetensors",
        "README.md",
    ]
    allow, ignore = options["allow_patterns"], options["ignore_patterns"]
    wanted = filter_repo_objects(files, allow_patterns=allow, ignore_patterns=ignore)
    assert list(wanted) == files[:4]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.RepositoryNotFoundError),
            "the hub has no checkpoint 'owner/name', or it is private",
        ),
        (http_error(errors.GatedRepoError), "is gated.*--hf-token"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (http_error(errors.HfHubHTTPError), r"could not be downloaded \(HfHubHTTPError\): try again"),
        (errors.HFValidationError("bad name"), "the hub has no checkpoint"),
        (TimeoutError(), "could not be downloaded"),
        (RuntimeError("of the HTTP client"), "could not be downloaded"),
    ],
)
def test_the_hub_s_errors_say_what_to_do_and_carry_no_internals(
    error: Exception, message: str, hub: Hub, tmp_path: Path
) -> None:
    hub.error = error
    with pytest.raises(CheckpointError, match=message) as caught:
        locate("owner/name", ckpt_folder=tmp_path)
    assert "secret-detail" not in str(caught.value)


def test_offline_an_earlier_download_is_used(hub: Hub, tmp_path: Path) -> None:
    hub.error = errors.LocalEntryNotFoundError("offline")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text(json.dumps(tiny_config()))
    assert locate("owner/name", ckpt_folder=tmp_path) == tmp_path / "owner" / "name"


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c", "~/models"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_not_looked_for(model: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="owner/name"):
        locate(model, ckpt_folder=tmp_path)
    assert not hub.asked


def test_without_downloading_only_what_is_here_is_used(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        locate("owner/name", ckpt_folder=tmp_path, download=False)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name", ckpt_folder=tmp_path, download=False) == tmp_path / "owner" / "name"
    assert not hub.asked
