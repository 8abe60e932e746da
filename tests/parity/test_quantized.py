"""Quantised models against transformers with the numbers that their weights stand for, in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from mdi.checkpoint.loader import chunk_weights, load_chunk
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.core.quantization import ModelQuantization
from mdi.models.stage import Stage
from tests.parity.conftest import qwen2_vl_config
from tests.parity.test_model import PROMPTS, logits_of, oracle_logits, relative_difference

QUANTIZATIONS = [ModelQuantization("int8", "int8", "int8"), ModelQuantization("int4", "int8", "int4")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths are multiples of all groups, and layers do not multiply what rounding adds."""
    config = qwen2_vl_config(hidden_size=128, intermediate_size=192, num_attention_heads=8, initializer_range=0.06)
    config.vision_config.hidden_size = config.vision_config.embed_dim = 128
    config.vision_config.initializer_range = 0.06
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("float")
    Qwen2VLForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=QUANTIZATIONS, ids=str)
def folders(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Chunks of one node and of three."""
    path = tmp_path_factory.mktemp("quantized") / "model"
    shutil.copytree(checkpoint, path)
    return [prepare(open_source(path), n_nodes, quantization=request.param) for n_nodes in (1, 3)]


@pytest.fixture(scope="module")
def dequantized(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Qwen2VLForConditionalGeneration:
    path = tmp_path_factory.mktemp("dequantized")
    config = json.loads((folders[0].parents[1] / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(chunk_weights(folders[0] / "model_starter.safetensors"))
    save_file({name: weight.clone() for name, weight in weights.items()}, path / "model.safetensors", {"format": "pt"})
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    return model.eval()


def stages_of(folder: Path) -> list[Stage]:
    chunks = Manifest.read(folder).chunks
    return [Stage(load_chunk(folder / chunk.file), n_slots=8, sequence_length=512) for chunk in chunks]


def both_logits(folders: list[Path], name: str) -> tuple[Tensor, Tensor]:
    alone, spread = (logits_of(stages_of(folder), PROMPTS[name]) for folder in folders)
    return alone, spread


@pytest.mark.parametrize("name", ["text", "three images"])
def test_logits_of_one_node_and_of_three_are_those_of_the_dequantised_model(
    name: str, folders: list[Path], dequantized: Qwen2VLForConditionalGeneration
) -> None:
    alone, spread = both_logits(folders, name)
    assert torch.equal(alone, spread)
    theirs = oracle_logits(dequantized, PROMPTS[name])
    assert torch.cosine_similarity(alone.flatten(), theirs.flatten(), dim=0) > 0.999  # activations may be int8


def test_without_kernels_they_are_within_1e_4(
    folders: list[Path], dequantized: Qwen2VLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdi.layers.linear.library", lambda: None)
    for ours in both_logits(folders, "one image"):
        assert relative_difference(ours, oracle_logits(dequantized, PROMPTS["one image"])) < 1e-4
