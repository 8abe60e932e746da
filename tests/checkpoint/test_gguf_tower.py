"""Vision towers of `mmproj` files: the model is the one that was written, with its images."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from testing.checkpoints import (
    tiny_config,
    tiny_deepstack_config,
    tiny_deepstack_experts_config,
    tiny_windowed_config,
)
from testing.gguf_files import dequantised, write_gguf, write_mmproj

from mdi import Engine, SamplingParams
from mdi.bench.verify import verify
from mdi.checkpoint.gguf import gguf_folder
from mdi.checkpoint.gguf_file import GgufFile
from mdi.checkpoint.gguf_tower import TOWERS as KNOWN
from mdi.checkpoint.processing import media_specs
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.cli.ask import user_message
from mdi.core.config import ModelSettings
from mdi.core.errors import CheckpointError
from mdi.media.patches import normalized_bytes
from mdi.models.registry import read_config

GREEDY = SamplingParams(temperature=0, max_tokens=8)
TOWERS = {
    "qwen2_vl": tiny_config(num_hidden_layers=3),
    "qwen2_5_vl": tiny_windowed_config(num_hidden_layers=3),
    "qwen3_vl": tiny_deepstack_config(num_hidden_layers=3),
    "qwen3_vl_moe": tiny_deepstack_experts_config(num_hidden_layers=3),
}
SPLIT = ("qwen2_vl", "qwen3_vl_moe")
UNQUANTISED = ("pos_embed.weight", ".mlp.gate.weight")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_random_checkpoint(folder / name, config) for name, config in TOWERS.items()}


@pytest.fixture(scope="module")
def written(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("written")
    return {
        name: (
            write_gguf(path, folder / f"{name}.gguf", "F32"),
            write_mmproj(path, folder / f"mmproj-{name}.gguf", "F32"),
        )
        for name, path in checkpoints.items()
    }


def question(seed: int) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (84, 140, 3), dtype=np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    content = [{"type": "image", "image": picture.getvalue()}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_0"])
@pytest.mark.parametrize("family", TOWERS)
def test_tensors_and_config_are_those_that_were_written(
    family: str, kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path = checkpoints[family]
    file, mmproj = write_gguf(path, tmp_path / "a.gguf", kind), write_mmproj(path, tmp_path / "b.gguf", kind)
    source, original = open_source(gguf_folder(file, mmproj)), open_source(path)
    assert source.names() == original.names()
    for name in original.names():
        weight = original.tensor(name)
        assert source.spec(name).shape == tuple(weight.shape)
        exact = weight if weight.dim() == 1 or name.endswith(UNQUANTISED) else dequantised(weight, kind)
        assert torch.equal(source.tensor(name), exact), name
    assert source.model_config.vision == original.model_config.vision
    assert source.model_config.rope == original.model_config.rope
    assert source.model_config.image_token_id == original.model_config.image_token_id
    (cut, video), (expected, their_video) = media_specs(source), media_specs(original)
    assert video == their_video
    assert cut
    assert expected
    assert np.array_equal(normalized_bytes(cut), normalized_bytes(expected))
    means = replace(cut, image_mean=expected.image_mean, image_std=expected.image_std)  # which are float32 in the file
    assert means == expected


@pytest.mark.parametrize(
    ("family", "n_nodes"),
    [*((family, 1) for family in TOWERS), *(pytest.param(family, 3, marks=pytest.mark.slow) for family in SPLIT)],
)
def test_answers_are_those_of_the_checkpoint(
    family: str, n_nodes: int, checkpoints: dict[str, Path], written: dict[str, tuple[Path, Path]]
) -> None:
    file, mmproj = written[family]
    settings: dict[str, Any] = {"n_nodes": n_nodes, "dtype": "float32"}
    with Engine(checkpoints[family], **settings) as original, Engine(file, mmproj=mmproj, **settings) as engine:
        assert engine.model_name == family
        for seed in range(2):
            assert engine.chat(question(seed), GREEDY).token_ids == original.chat(question(seed), GREEDY).token_ids


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_quantised_towers_answer_nearly_the_same(
    quantization: str | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path = checkpoints["qwen2_vl"]
    file, mmproj = write_gguf(path, tmp_path / "a.gguf", "Q8_0"), write_mmproj(path, tmp_path / "b.gguf", "Q8_0")
    with Engine(file, mmproj=mmproj, vision_quantization=quantization) as engine:
        formats = engine.nodes()[0].quantization
        assert (formats.layers, formats.vision) == ("int8-32", quantization or "int8-32")
        [first, *_] = engine.chat(question(0), GREEDY).samples[0].tokens
    with Engine(path, dtype="float32") as original:
        [expected, *_] = original.chat(question(0), GREEDY).samples[0].tokens
    assert first.id == expected.id
    assert first.logprob == pytest.approx(expected.logprob, abs=0.1)


@pytest.mark.parametrize(
    ("family", "quantization"), [("qwen2_vl", "none"), ("qwen2_vl", None), ("qwen3_vl", "none"), ("qwen3_vl_moe", None)]
)
def test_verify_compares_with_transformers(
    family: str, quantization: str | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path, image = checkpoints[family], tmp_path / "image.png"
    file, mmproj = write_gguf(path, tmp_path / "a.gguf", "Q8_0"), write_mmproj(path, tmp_path / "b.gguf", "Q8_0")
    image.write_bytes(question(0)[0]["content"][0]["image"])
    source = open_source(gguf_folder(file, mmproj))
    formats = ModelSettings(quantization=quantization).formats(source.quantization) or source.quantization
    report = verify(source, user_message("What is it?", [str(image)], []), dtype="float32", quantization=formats)
    assert report.same_prompt
    assert report.relative < (0.05 if quantization is None else 1e-4)
    assert quantization is None or report.first_difference is None


def test_without_its_tower_the_model_reads_text(
    checkpoints: dict[str, Path], written: dict[str, tuple[Path, Path]]
) -> None:
    text = [{"role": "user", "content": "What is at hand?"}]
    file, _ = written["qwen2_vl"]
    with Engine(checkpoints["qwen2_vl"], dtype="float32") as original, Engine(file, dtype="float32") as engine:
        assert engine.capabilities.modalities == ("text",)
        assert engine.chat(text, GREEDY).token_ids == original.chat(text, GREEDY).token_ids


def test_ends_of_mlps_that_older_converters_exchange_are_found(written: dict[str, tuple[Path, Path]]) -> None:
    names = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    vision = read_config(TOWERS["qwen2_vl"]).vision
    assert vision
    tower, checked = KNOWN["qwen2vl_merger"], 0
    for tensor in GgufFile.read(written["qwen2_vl"][1]).tensors.values():
        for part in (part for part in names if part in tensor.name):
            exchanged = replace(tensor, name=tensor.name.replace(part, names[part]))
            assert tower.place(exchanged, vision) == tower.place(tensor, vision)
            checked += 1
    assert checked == 8  # weights and biases of two blocks


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"general.architecture": "llama"}, "b.gguf is no mmproj file: give --mmproj the file"),
        ({"clip.projector_type": "gemma3"}, "a vision tower 'gemma3': supported are qwen2vl_merger"),
        ({"clip.vision.projection_dim": 128}, "its embeddings have 128 numbers, those of a.gguf 64"),
        ({"clip.vision.patch_size": "x"}, "vision_config"),
        ({"clip.use_gelu": True}, "activation 'gelu' is not supported in the vision tower"),
    ],
)
def test_towers_that_do_not_fit_are_refused(
    entries: dict[str, Any], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path = checkpoints["qwen2_vl"]
    file, mmproj = (
        write_gguf(path, tmp_path / "a.gguf", "F16"),
        write_mmproj(path, tmp_path / "b.gguf", "F16", **entries),
    )
    with pytest.raises(CheckpointError, match=message), Engine(file, mmproj=mmproj):
        pass


@pytest.mark.parametrize(
    ("without", "entries", "message"),
    [
        ("", {"qwen3vl.n_deepstack_layers": 2}, "b.gguf is of another model: its features go to 3 layers, .* a.gguf 2"),
        ("v.position_embd.weight", {}, "b.gguf lacks the tensor v.position_embd.weight: download it again"),
        ("v.blk.0.ffn_up.weight", {}, "b.gguf lacks the tensor v.blk.0.ffn_up.weight: download it again"),
        ("v.deepstack.1.fc1.bias", {}, r"lacks the tensor visual.deepstack_merger_list.1.linear_fc1.bias: download"),
        ("v.patch_embd.weight.1", {}, r"visual.patch_embed.proj.weight has shape \[32, 3, 1, 16, 16\]"),
    ],
)
def test_towers_that_lack_something_are_refused(
    without: str, entries: dict[str, Any], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path = checkpoints["qwen3_vl"]
    file = write_gguf(path, tmp_path / "a.gguf", "F16", **entries)
    mmproj = write_mmproj(path, tmp_path / "b.gguf", "F16", without=without)
    with pytest.raises(CheckpointError, match=message), Engine(file, mmproj=mmproj):
        pass


@pytest.mark.parametrize(("model", "tower"), [("qwen3_vl", "qwen2_vl"), ("qwen2_5_vl", "qwen3_vl")])
def test_towers_of_another_family_are_refused(model: str, tower: str, written: dict[str, tuple[Path, Path]]) -> None:
    message = f"mmproj-{tower}.gguf is for models of the architecture .*: take the file that was published beside"
    with pytest.raises(CheckpointError, match=message):
        gguf_folder(written[model][0], written[tower][1])


def test_files_in_each_others_place_are_refused(
    written: dict[str, tuple[Path, Path]], checkpoints: dict[str, Path]
) -> None:
    file, mmproj = written["qwen2_vl"]
    with pytest.raises(CheckpointError, match="holds a vision tower only: name the model"):
        gguf_folder(mmproj)
    with pytest.raises(CheckpointError, match="is no mmproj file"):
        gguf_folder(file, file)
    with pytest.raises(CheckpointError, match="there is no mmproj file"):
        gguf_folder(file, file.with_name("other.gguf"))
    with (
        pytest.raises(CheckpointError, match="--mmproj is the vision tower of a GGUF file, which"),
        Engine(checkpoints["qwen2_vl"], mmproj=mmproj),
    ):
        pass


def test_the_folder_says_how_images_are_cut(written: dict[str, tuple[Path, Path]]) -> None:
    settings = json.loads((gguf_folder(*written["qwen2_vl"]) / "preprocessor_config.json").read_text())
    assert (settings["patch_size"], settings["merge_size"], len(settings["image_mean"])) == (14, 2, 3)
