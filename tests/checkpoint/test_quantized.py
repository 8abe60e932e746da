"""Chunks of quantised weights: what they hold, where they lie, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.checkpoints import tiny_config
from torch import Tensor

from mdi.checkpoint.cache import CacheEntry
from mdi.checkpoint.loader import chunk_weights, load_chunk
from mdi.checkpoint.manifest import FILE_NAME, Manifest
from mdi.checkpoint.prepare import prepare, prepared
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.safetensors import SINGLE
from mdi.checkpoint.source import Source, open_source
from mdi.core.errors import CheckpointError
from mdi.core.quantization import INT4_MINIMUMS, QUANTIZATIONS, ModelQuantization
from mdi.core.tensors import total_bytes
from mdi.layers.quantize import dequantize, quantize
from mdi.models.config import StageSpec
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.weights import stage_specs
from mdi.planning.predict import stage_summary

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.5.mlp.down_proj.weight"
FC1, PATCHES = "visual.blocks.0.mlp.fc1.weight", "visual.patch_embed.proj.weight"
LAYERS, ALL = ModelQuantization(layers="int4"), ModelQuantization("int4", "int8", "int4")
FORMATS = [*QUANTIZATIONS, INT4_MINIMUMS.name]


@pytest.fixture
def untied(tmp_path: Path) -> Source:
    return open_source(write_random_checkpoint(tmp_path / "untied", tiny_config(tie_word_embeddings=False)))


def change(source: Source, name: str, number: float, *, everywhere: bool = False) -> None:
    """Writes a number into a tensor of the checkpoint, or in place of all its numbers."""
    weights = load_file(source.path / SINGLE)
    weights[name].view(-1)[slice(None) if everywhere else slice(1)] = number
    save_file(weights, source.path / SINGLE, {"format": "pt"})


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("n_nodes", [1, 3])
def test_chunks_hold_every_weight_once_rounded_to_its_format(format_: str, n_nodes: int, source: Source) -> None:
    quantization = ModelQuantization(format_, format_, format_)
    folder = prepare(source, n_nodes, quantization=quantization)
    manifest = Manifest.read(folder)
    assert manifest.quantization == quantization
    found: dict[str, Tensor] = {}
    for chunk in manifest.chunks:
        found |= dict(chunk_weights(folder / chunk.file))
    specs = stage_specs(source.model_config, StageSpec.everything(source.model_config), "float32", quantization)
    assert found.keys() == specs.keys()
    for name, spec in specs.items():
        weight = source.tensor(EMBEDDING if name == LM_HEAD else name)
        expected = dequantize(quantize(weight, spec.quantization)).view_as(weight) if spec.quantization else weight
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("format_", FORMATS)
def test_a_chunk_is_as_large_as_the_plan_says(format_: str, source: Source) -> None:
    quantization = ModelQuantization(format_, format_, format_)
    folder = prepare(source, 2, dtype="bfloat16", quantization=quantization)
    for chunk in Manifest.read(folder).chunks:
        content = (folder / chunk.file).read_bytes()
        data_bytes = len(content) - 8 - int.from_bytes(content[:8], "little")
        summary = stage_summary(source.model_config, chunk.spec, "bfloat16", quantization=quantization)
        assert summary.size_bytes == data_bytes
        plain = stage_summary(source.model_config, chunk.spec, "bfloat16")
        assert summary.parameters == plain.parameters
        assert summary.step_bytes < (0.4 if format_ == "int4" else 0.6) * plain.step_bytes


def test_a_tied_head_that_is_quantised_is_stored_by_itself_and_the_embedding_is_not_touched(source: Source) -> None:
    folder = prepare(source, 2, quantization=ModelQuantization(head="int8"))
    first, last = (load_file(folder / chunk.file) for chunk in Manifest.read(folder).chunks)
    assert torch.equal(first[EMBEDDING], source.tensor(EMBEDDING))
    assert LM_HEAD not in first
    assert EMBEDDING not in last
    assert last[LM_HEAD].dtype == torch.int8
    assert last[f"{LM_HEAD}_scale"].shape == (272, 1)


def test_an_untied_head_is_quantised_as_well(untied: Source) -> None:
    last = dict(chunk_weights(prepare(untied, 2, quantization=ALL) / "model_finisher.safetensors"))
    assert torch.equal(last[LM_HEAD], dequantize(quantize(untied.tensor(LM_HEAD), QUANTIZATIONS["int8"])))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_stage_computes_in_each_dtype_with_quantised_weights(format_: str, dtype: str, source: Source) -> None:
    quantization = ModelQuantization(format_, format_, format_)
    path = prepare(source, 1, dtype=dtype, quantization=quantization) / "model_starter.safetensors"
    loaded = load_chunk(path)
    assert loaded.quantization == quantization
    assert loaded.decoder.embedding is not None
    assert loaded.decoder.embedding.dtype == loaded.dtype
    logits = loaded.decoder.logits(torch.randn(3, 64).to(loaded.dtype))
    assert logits.dtype == loaded.dtype
    weights = dict(chunk_weights(path))
    norm, head = weights["model.norm.weight"].float(), weights[LM_HEAD]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    exact = torch.rms_norm(x, (64,), norm, 1e-6) @ head.T
    assert torch.cosine_similarity(loaded.decoder.logits(x.to(loaded.dtype)).float(), exact).min() > 0.999


def test_preparing_twice_gives_the_same_bytes(source: Source) -> None:
    first = [chunk.sha256 for chunk in Manifest.read(prepare(source, 2, quantization=ALL)).chunks]
    assert [chunk.sha256 for chunk in Manifest.read(prepare(source, 2, quantization=ALL)).chunks] == first


def test_progress_rises_to_the_number_of_bytes_written(source: Source) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = prepare(source, 2, quantization=ALL, progress=lambda *told: seen.append(told))
    specs = [stage_specs(source.model_config, chunk.spec, "float32", ALL) for chunk in Manifest.read(folder).chunks]
    total = sum(total_bytes(stage.values()) for stage in specs)
    assert [told for told in seen if told[0] == "preparing chunks"][-1] == ("preparing chunks", total, total)


# where they lie


def test_chunks_of_another_quantisation_lie_beside(source: Source) -> None:
    with closing(prepared(source, 2)) as plain, closing(prepared(source, 2, quantization=ALL)) as quantized:
        assert plain.folder.name == "2nodes"
        assert quantized.folder.name == "2nodes-float32-int4-head-int8-vision-int4"
    with closing(prepared(source, 2, quantization=LAYERS)) as other:
        assert other.folder.name == "2nodes-float32-int4-head-none"
    assert plain.manifest.plan_hash != quantized.manifest.plan_hash
    with closing(prepared(source, 2)) as again:  # nobody who asks for nothing gets quantised weights by accident
        assert again.folder == plain.folder


def test_quantised_chunks_that_were_made_on_the_way_are_not_those_of_the_usual_place(source: Source) -> None:
    with closing(prepared(source, 2, quantization=ALL)) as quantized, closing(prepared(source, 2)) as plain:
        assert quantized.folder.name != "2nodes"
        assert plain.manifest.quantization == ModelQuantization()


def test_chunks_in_the_usual_place_are_taken_by_whom_all_is_right(source: Source) -> None:
    folder = prepare(source, 2, quantization=ALL)
    with closing(prepared(source, 2)) as taken, closing(prepared(source, 2, quantization=ALL)) as asked:
        assert taken.folder == asked.folder == folder
    with closing(prepared(source, 2, quantization=ModelQuantization())) as plain:
        assert plain.folder != folder


# weights that cannot be quantised


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP, FC1])
def test_numbers_that_no_format_has_are_refused_by_name(name: str, number: float, source: Source) -> None:
    change(source, name, number)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be quantised: it has numbers that are infinite or none"):
        prepare(source, 2, quantization=ALL)
    assert not (source.path / "chunks" / "2nodes").exists()


@pytest.mark.parametrize("number", [1e9, 1e-9])
def test_a_weight_that_float16_scales_cannot_describe_stays_as_it_is(
    number: float, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    change(source, DOWN, number, everywhere=True)
    folder = prepare(source, 3, quantization=ALL)
    assert f"{DOWN} cannot be quantised" in caplog.text
    assert "stays in float32" in caplog.text
    manifest = Manifest.read(folder)
    assert manifest.quantization == replace(ALL, kept=(DOWN,))
    last = load_file(folder / "model_finisher.safetensors")
    assert torch.equal(last[DOWN], source.tensor(DOWN))
    assert last["model.layers.5.mlp.up_proj.weight"].dtype == torch.uint8
    load_chunk(folder / "model_finisher.safetensors")
    with closing(prepared(source, 3, quantization=ALL)) as found:
        assert found.folder == folder


def test_a_width_that_is_no_multiple_of_the_group_is_named_and_stays(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prepare(source, 2, quantization=ALL)
    assert f"{PATCHES}: not quantised, because the width is no multiple of the group" in caplog.text
    first = load_file(folder / "model_starter.safetensors")
    assert first[PATCHES].shape == (32, 3, 2, 14, 14)
    assert torch.equal(first[PATCHES], source.tensor(PATCHES))
    assert first[FC1].dtype == torch.uint8


def test_a_head_of_such_a_width_stays_the_embedding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(hidden_size=72, num_attention_heads=2, num_key_value_heads=1, vision_config={})
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [6, 6, 6]}
    source = open_source(write_random_checkpoint(tmp_path / "odd", config))
    last = load_file(prepare(source, 2, quantization=ModelQuantization(head="int4")) / "model_finisher.safetensors")
    assert torch.equal(last[EMBEDDING], source.tensor(EMBEDDING))
    assert f"{LM_HEAD}: not quantised" in caplog.text


def test_nothing_is_logged_where_all_is_quantised(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        prepare(source, 2, quantization=ModelQuantization("int8", "int8"))
    assert not caplog.records


# chunks that are not what they should be


def test_a_chunk_of_another_quantisation_beside_the_manifest_is_refused(source: Source, tmp_path: Path) -> None:
    shutil.copytree(prepare(source, 2, quantization=ALL), tmp_path / "other")
    folder = prepare(source, 2, quantization=LAYERS)
    shutil.copy(tmp_path / "other" / "model_starter.safetensors", folder)
    with pytest.raises(CheckpointError, match="prepared for another plan, dtype, quantisation or node"):
        load_chunk(folder / "model_starter.safetensors")


@pytest.mark.parametrize("names", [{"layers": "int3"}, {"head": "int4 "}, {"vision": ""}, {"vision": "INT4"}])
def test_a_manifest_that_names_a_format_of_another_version_says_so(names: dict[str, str], source: Source) -> None:
    folder = prepare(source, 2, quantization=ALL)
    content = json.loads((folder / FILE_NAME).read_text())
    content["quantization"] |= names
    (folder / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"quantisation '.*' is unknown: use one of int8, int8-32, int4"):
        load_chunk(folder / "model_starter.safetensors")


@pytest.mark.parametrize("value", [None, "int4", {"layers": 4}, {"kept": "x"}, {"more": "int4"}])
def test_a_manifest_with_a_damaged_quantisation_is_refused(value: object, source: Source) -> None:
    folder = prepare(source, 2)
    content = json.loads((folder / FILE_NAME).read_text())
    (folder / FILE_NAME).write_text(json.dumps({**content, "quantization": value}))
    with pytest.raises(CheckpointError, match="damaged or of another version"):
        Manifest.read(folder)


def test_an_entry_of_the_cache_says_how_its_chunks_are_quantised(source: Source) -> None:
    entry = CacheEntry(prepare(source, 2, dtype="bfloat16", quantization=ALL), 0, 0.0)
    assert entry.contents == "copy, bfloat16, int4 (head int8, vision int4): finisher, starter"
