"""Checkpoints as people have them: one file or many, old names and new, whole or not; the hub's refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from testing.checkpoints import tiny_config

from mdi.checkpoint import bundled
from mdi.checkpoint.source import INDEX, SINGLE, Source, locate
from mdi.core.errors import CheckpointError
from mdi.models.weights import EMBEDDING, FINAL_NORM, LM_HEAD

Weights = dict[str, torch.Tensor]


def all_weights(path: Path) -> Weights:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change_weights(path: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(path / SINGLE)), path / SINGLE)


def change_config(path: Path, **entries: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | entries
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["tiny", "sharded", "text_only"])
def test_every_tensor_is_found_as_it_is_stored(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    source, expected = Source.open(path), all_weights(path)
    assert source.names() == expected.keys()
    for stored, tensor in expected.items():
        assert source.shape(stored) == tuple(tensor.shape)
        assert torch.equal(source.tensor(stored), tensor)


def test_the_sharded_checkpoint_really_has_several_files(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert not (sharded / SINGLE).exists()


def test_names_of_newer_transformers_are_read_under_the_hub_s(own_copy: Path) -> None:
    before = all_weights(own_copy)

    def rename(weights: Weights) -> Weights:
        inside = {"visual.": "model.visual.", "model.": "model.language_model."}
        return {
            next(new + name.removeprefix(old) for old, new in inside.items() if name.startswith(old)): tensor
            for name, tensor in weights.items()
        }

    change_weights(own_copy, rename)
    assert not before.keys() & all_weights(own_copy).keys()
    source = Source.open(own_copy)
    assert source.names() == before.keys()
    assert torch.equal(source.tensor("visual.merger.ln_q.bias"), before["visual.merger.ln_q.bias"])
    assert torch.equal(source.tensor(FINAL_NORM), before[FINAL_NORM])


def test_the_nested_config_of_transformers_5_is_the_same_model(own_copy: Path) -> None:
    flat = Source.open(own_copy).model_config
    config = json.loads((own_copy / "config.json").read_text())
    outside = ("architectures", "model_type", "vision_config", "tie_word_embeddings", "torch_dtype")
    top = {key: value for key, value in config.items() if key in outside or key.endswith("token_id")}
    text = {key: value for key, value in config.items() if key not in top}
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    (own_copy / "config.json").write_text(json.dumps({**top, "text_config": text}))
    assert Source.open(own_copy).model_config == flat


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        Source.open(tmp_path / "nowhere")


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Source.open(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(own_copy: Path, text: str) -> None:
    (own_copy / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Source.open(own_copy)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vision_config"])
def test_a_config_that_lacks_an_entry_is_refused_by_the_entry_s_name(own_copy: Path, missing: str) -> None:
    config = json.loads((own_copy / "config.json").read_text())
    del config[missing]
    (own_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=missing):
        Source.open(own_copy)


def test_an_unsupported_architecture_is_named_with_those_that_are_supported(own_copy: Path) -> None:
    change_config(own_copy, architectures=["BertModel"])
    with pytest.raises(CheckpointError, match=r"BertModel.*supported: Qwen2VL"):
        Source.open(own_copy)


def test_pickled_weights_are_never_opened_but_the_remedy_is_named(own_copy: Path) -> None:
    (own_copy / SINGLE).rename(own_copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"convert its pytorch_model\.bin to safetensors"):
        Source.open(own_copy)


def test_a_checkpoint_without_weights_is_refused(own_copy: Path) -> None:
    (own_copy / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="is the download complete"):
        Source.open(own_copy)


def test_a_truncated_file_is_refused(own_copy: Path) -> None:
    content = (own_copy / SINGLE).read_bytes()
    (own_copy / SINGLE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        Source.open(own_copy)


def test_a_shard_that_was_not_downloaded_is_named(sharded: Path, tmp_path: Path) -> None:
    for file in sharded.iterdir():
        if file.is_file() and "00002" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors"):
        Source.open(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
def test_a_damaged_index_is_refused(own_copy: Path, text: str) -> None:
    (own_copy / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"safetensors\.index\.json"):
        Source.open(own_copy)


def test_a_tensor_the_architecture_does_not_have_is_refused_by_name(own_copy: Path) -> None:
    change_weights(own_copy, lambda weights: weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.self_attn\.q_norm\.weight"):
        Source.open(own_copy)


def test_a_stored_copy_of_a_tied_head_and_rotary_tables_are_no_tensors_too_many(own_copy: Path) -> None:
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(own_copy, lambda weights: weights | extras | {LM_HEAD: weights[EMBEDDING].clone()})
    assert LM_HEAD in Source.open(own_copy).names()


def test_a_quantised_checkpoint_is_refused(own_copy: Path) -> None:
    change_config(own_copy, quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="quantised"):
        Source.open(own_copy)


# locate: what the hub answers is translated here; the network is not touched


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


def test_the_bundled_model_is_copied_once_and_again_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, folder = tmp_path / "shipped", tmp_path / "checkpoints"
    shipped.mkdir()
    (shipped / SINGLE).write_bytes(b"first")
    monkeypatch.setattr(bundled, "SHIPPED", shipped)
    copy = locate("bundled", ckpt_folder=folder)
    assert copy == folder / "bundled"
    (copy / "chunks").mkdir()
    assert locate("bundled", ckpt_folder=folder, download=False) == copy
    assert (copy / "chunks").exists()
    (shipped / SINGLE).write_bytes(b"other")
    locate("bundled", ckpt_folder=folder)
    assert (copy / SINGLE).read_bytes() == b"other"
    assert [path.name for path in folder.iterdir()] == ["bundled"]
    assert not (copy / "chunks").exists()


def test_a_bundled_model_that_cannot_be_copied_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match="--ckpt-folder"):
        locate("bundled", ckpt_folder=tmp_path / "file")
