"""Qwen3-MoE against transformers: files of every form, bfloat16, quantised, and configs that contradict themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.checkpoints import tiny_text_config
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mdi.checkpoint.loader import chunk_weights, load_chunk, load_source
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.safetensors import SINGLE
from mdi.checkpoint.source import open_source
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.quantization import ModelQuantization
from mdi.models.registry import read_config
from mdi.models.shards import Shards
from mdi.models.stage import Stage
from tests.parity.conftest import load_stages
from tests.parity.test_model import Prompt, logits_of, relative_difference
from tests.parity.test_text_families import SIZES, TEXT

EXPERTS: dict[str, Any] = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "mlp_only_layers": [2],
    "intermediate_size": 128,
    "initializer_range": 0.1,
}
EXPERT = "model.layers.1.mlp.experts.5."


@pytest.fixture(scope="module")
def oracle() -> Qwen3MoeForCausalLM:
    torch.manual_seed(3)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **EXPERTS})).eval()


@pytest.fixture
def checkpoint(oracle: Qwen3MoeForCausalLM, tmp_path: Path) -> Path:
    oracle.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def logits(model: Qwen3MoeForCausalLM) -> Tensor:
    return model(torch.tensor([TEXT]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def stage_of(path: Path) -> Stage:
    return Stage(load_source(open_source(path)), n_slots=1, sequence_length=512)


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "200KB"}, {"save_original_format": False}], ids=str)
def test_files_of_every_form_have_the_same_weights(
    settings: dict[str, Any], oracle: Qwen3MoeForCausalLM, tmp_path: Path
) -> None:
    oracle.save_pretrained(tmp_path, **settings)
    source = open_source(tmp_path)
    assert source.spec(f"{EXPERT}gate_proj.weight").shape == (64, 64)
    assert relative_difference(logits_of([stage_of(tmp_path)], Prompt(TEXT)), logits(oracle)) < 1e-4


def test_in_bfloat16_they_are_near(oracle: Qwen3MoeForCausalLM, checkpoint: Path) -> None:
    ours = logits_of(load_stages(checkpoint, 2, dtype=torch.bfloat16), Prompt(TEXT)).float()
    assert torch.cosine_similarity(ours.flatten(), logits(oracle).flatten(), dim=0) > 0.999


def stages_of(folder: Path) -> list[Stage]:
    chunks = Manifest.read(folder).chunks
    return [Stage(load_chunk(folder / chunk.file), n_slots=1, sequence_length=512) for chunk in chunks]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("format_", ["int8", "int4"])
def test_a_quantised_model_has_the_numbers_that_its_weights_stand_for(
    format_: str, kernels: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr("mdi.layers.linear.library", lambda: None)
    source = open_source(checkpoint)
    folders = [prepare(source, n_nodes, quantization=ModelQuantization(format_, format_)) for n_nodes in (1, 3)]
    alone, spread = (logits_of(stages_of(folder), Prompt(TEXT)) for folder in folders)
    assert torch.equal(alone, spread)
    exact = tmp_path / "dequantised"
    exact.mkdir()
    (exact / "config.json").write_text((checkpoint / "config.json").read_text())
    weights = dict(chunk_weights(folders[0] / "model_starter.safetensors"))
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(weights[router], source.tensor(router))
    assert not torch.equal(weights[f"{EXPERT}up_proj.weight"], source.tensor(f"{EXPERT}up_proj.weight"))
    save_file({name: weight.clone() for name, weight in weights.items()}, exact / SINGLE, {"format": "pt"})
    theirs = logits(Qwen3MoeForCausalLM.from_pretrained(exact, dtype=torch.float32).eval())
    if kernels:
        assert torch.cosine_similarity(alone.flatten(), theirs.flatten(), dim=0) > 0.999  # activations may be int8
    else:
        assert relative_difference(alone, theirs) < 1e-4


CONFIG = tiny_text_config(
    "qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but num_experts is 8"),
        ({"num_local_experts": 4}, "num_experts is 8, but num_local_experts is 4"),
        ({"num_experts": -1}, "num_experts should be greater than or equal to 0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size should be greater than or equal to 1"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob should be a valid boolean"),
        ({"mlp_only_layers": 3}, "mlp_only_layers should be a valid list"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step should be greater than or equal to 1"),
    ],
)
def test_a_config_that_makes_no_experts_is_refused_by_entry(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        read_config(json.loads(json.dumps(CONFIG | changes)))


def test_which_layers_have_experts_is_as_in_transformers() -> None:
    for changes in ({"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}, {"num_experts": 0}, {}):
        config = read_config(CONFIG | changes)
        with torch.device("meta"):
            theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**CONFIG, **changes}))
        mixed = [index for index, layer in enumerate(theirs.model.layers) if hasattr(layer.mlp, "experts")]
        assert [index for index in range(config.n_layers) if config.experts_of(index)] == mixed


def test_a_window_slides_in_all_layers() -> None:
    config = read_config(CONFIG | {"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 6})
    assert {kind.window for kind in config.kinds} == {300}


def test_shards_divide_the_inner_width_of_experts() -> None:
    config = read_config(CONFIG | {"intermediate_size": 7, "moe_intermediate_size": 96})
    assert Shards.of(config, 4).inner == {96: (0, 24, 48, 72, 96)}
    with pytest.raises(ConfigError, match="2 shards are too many for the model's experts' intermediate size, 96"):
        Shards.of(replace(config, head_dim=64), 2, 64)


def test_a_missing_expert_and_one_of_another_shape_are_named(checkpoint: Path) -> None:
    weights, name = load_file(checkpoint / SINGLE), f"{EXPERT}up_proj.weight"
    save_file({**weights, name: torch.zeros(64, 32)}, checkpoint / SINGLE)
    with pytest.raises(CheckpointError, match=f"{name} has shape \\[64, 32\\], but config.json asks for \\[64, 64\\]"):
        load_source(open_source(checkpoint))
    save_file({stored: weight for stored, weight in weights.items() if stored != name}, checkpoint / SINGLE)
    with pytest.raises(CheckpointError, match=f"the weights lack the tensor {name}"):
        load_source(open_source(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text())
    save_file(weights, checkpoint / SINGLE)
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(CheckpointError, match=r"no tensor model.layers.0.mlp.experts.5.down_proj.weight"):
        open_source(checkpoint)
