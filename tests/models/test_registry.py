"""Each supported architecture has a family that reads its config; others are refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
from testing.checkpoints import tiny_config, tiny_text_config

from mdi.core.errors import CheckpointError
from mdi.layers.rope import RopeConfig
from mdi.models.registry import FAMILIES, family_of, read_config


def test_an_architecture_that_no_family_has_is_refused_with_those_that_are_supported() -> None:
    unknown: list[dict[str, Any]] = [{"architectures": ["BertModel"]}, {"architectures": []}, {}]
    for config in unknown:
        with pytest.raises(CheckpointError) as refused:
            read_config(config)
        assert all(architecture in str(refused.value) for architecture in FAMILIES)
    with pytest.raises(CheckpointError, match="BertModel"):
        family_of("BertModel")


def test_qwen2_has_biases_one_axis_of_positions_and_no_tower() -> None:
    config = read_config(tiny_text_config())
    assert (config.qkv_bias, config.qk_norm, config.tied_embeddings) == (True, False, True)
    assert config.rope == RopeConfig("default", 1e6)
    assert (config.vision, config.image_token_id, config.video_token_id) == (None, None, None)
    assert family_of(config.architecture).vision_tower is None


def test_qwen2_vl_has_three_axes_of_positions_and_a_tower() -> None:
    config = read_config(tiny_config())
    assert config.rope == RopeConfig("mrope", 1e6, (2, 3, 3))
    assert config.vision is not None
    assert (config.vision.width, config.vision.mlp_size, config.vision.out_size) == (32, 128, 64)
    assert (config.image_token_id, config.video_token_id) == (262, 263)


def test_a_head_size_of_its_own_is_taken_from_the_config() -> None:
    assert read_config(tiny_text_config()).head_dim == 16
    config = read_config(tiny_text_config(head_dim=32))
    assert (config.head_dim, config.q_size, config.kv_size) == (32, 128, 64)


def test_names_of_other_versions_are_those_of_the_hub() -> None:
    family = family_of("Qwen2VLForConditionalGeneration")
    assert family.hub_name("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert family.hub_name("model.visual.merger.ln_q.bias") == "visual.merger.ln_q.bias"
    assert family.hub_name("lm_head.weight") == "lm_head.weight"
    assert family.file_name("visual.merger.ln_q.bias") == "visual.merger.ln_q.bias"


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "visual.pos_embed.weight", "lm_head.weight"])
def test_files_of_qwen3_vl_have_nested_names(name: str) -> None:
    family = family_of("Qwen3VLForConditionalGeneration")
    nested = {"model": "model.language_model", "visual": "model.visual", "lm_head": "lm_head"}
    first, rest = name.split(".", 1)
    assert family.file_name(name) == f"{nested[first]}.{rest}"
    assert family.hub_name(family.file_name(name)) == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "RoPE scaling of type 'longrope'"),
        ({"layer_types": ["chunked_attention"] * 6}, "layers with chunked_attention are not supported"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported in the decoder"),
        ({"vision_config": {"hidden_act": "silu"}}, "activation 'silu' is not supported in the vision tower"),
    ],
)
def test_mathematics_that_no_family_has_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(tiny_config(**changes))


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "vision_config"])
def test_a_missing_entry_is_named(missing: str) -> None:
    config = tiny_config()
    del config[missing]
    with pytest.raises(CheckpointError, match=f"^config.json: {missing} is missing"):
        read_config(config)
