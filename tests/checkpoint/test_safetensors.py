"""Checkpoints as people have them: one file or many, old names and new, complete or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdi.checkpoint.safetensors import INDEX, SINGLE
from mdi.checkpoint.source import open_source
from mdi.core.errors import CheckpointError
from mdi.models.decoder import EMBEDDING, FINAL_NORM, LM_HEAD

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
    source, expected = open_source(path), all_weights(path)
    assert source.names() == expected.keys()
    for stored, tensor in expected.items():
        assert source.spec(stored).shape == tuple(tensor.shape)
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
    source = open_source(own_copy)
    assert source.names() == before.keys()
    assert torch.equal(source.tensor("visual.merger.ln_q.bias"), before["visual.merger.ln_q.bias"])
    assert torch.equal(source.tensor(FINAL_NORM), before[FINAL_NORM])


def test_the_nested_config_of_transformers_5_is_the_same_model(own_copy: Path) -> None:
    flat = open_source(own_copy).model_config
    config = json.loads((own_copy / "config.json").read_text())
    outside = ("architectures", "model_type", "vision_config", "tie_word_embeddings", "torch_dtype")
    top = {key: value for key, value in config.items() if key in outside or key.endswith("token_id")}
    text = {key: value for key, value in config.items() if key not in top}
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    (own_copy / "config.json").write_text(json.dumps({**top, "text_config": text}))
    assert open_source(own_copy).model_config == flat


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(own_copy: Path, text: str) -> None:
    (own_copy / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(own_copy)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vision_config"])
def test_a_config_that_lacks_an_entry_is_refused_by_the_entry_s_name(own_copy: Path, missing: str) -> None:
    config = json.loads((own_copy / "config.json").read_text())
    del config[missing]
    (own_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=missing):
        open_source(own_copy)


def test_an_unsupported_architecture_is_named_with_those_that_are_supported(own_copy: Path) -> None:
    change_config(own_copy, architectures=["BertModel"])
    with pytest.raises(CheckpointError, match=r"BertModel.*all: Qwen2VL"):
        open_source(own_copy)


def test_pickled_weights_are_never_opened_but_the_remedy_is_named(own_copy: Path) -> None:
    (own_copy / SINGLE).rename(own_copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"convert its pytorch_model\.bin to safetensors"):
        open_source(own_copy)


def test_a_checkpoint_without_weights_is_refused(own_copy: Path) -> None:
    (own_copy / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="is the download complete"):
        open_source(own_copy)


def test_a_truncated_file_is_refused(own_copy: Path) -> None:
    content = (own_copy / SINGLE).read_bytes()
    (own_copy / SINGLE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        open_source(own_copy)


def test_a_shard_that_was_not_downloaded_is_named(sharded: Path, tmp_path: Path) -> None:
    for file in sharded.iterdir():
        if file.is_file() and "00002" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
def test_a_damaged_index_is_refused(own_copy: Path, text: str) -> None:
    (own_copy / SINGLE).unlink()
    (own_copy / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"safetensors\.index\.json"):
        open_source(own_copy)


def test_a_tensor_the_architecture_does_not_have_is_refused_by_name(own_copy: Path) -> None:
    change_weights(own_copy, lambda weights: weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.self_attn\.q_norm\.weight"):
        open_source(own_copy)


def test_a_stored_copy_of_a_tied_head_and_rotary_tables_are_no_tensors_too_many(own_copy: Path) -> None:
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(own_copy, lambda weights: weights | extras | {LM_HEAD: weights[EMBEDDING].clone()})
    assert LM_HEAD in open_source(own_copy).names()
