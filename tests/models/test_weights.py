"""What a model declares is what it loads, and bytes are counted from that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from testing.checkpoints import tiny_config, tiny_text_config
from torch import Tensor

from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.quantization import ModelQuantization
from mdi.core.tensors import Specs, TensorSpec, Unquantized, stored_specs, total_bytes, total_size
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, FINAL_NORM, LM_HEAD
from mdi.models.registry import read_config
from mdi.models.weights import load_stage, stage_specs
from mdi.planning.plan import make_plan
from mdi.planning.predict import stage_summary

VISION, TEXT = read_config(tiny_config(vision_config={"embed_dim": 64})), read_config(tiny_text_config())
UNTIED = replace(TEXT, tied_embeddings=False)
VARIANT = replace(TEXT, qkv_bias=False, qk_norm=True, head_dim=32, norm_dtype="float32")


@pytest.mark.parametrize("config", [VISION, TEXT, UNTIED, VARIANT])
@pytest.mark.parametrize("n_nodes", [1, 2, 3])
def test_a_stage_loads_each_tensor_that_it_declares_once(config: ModelConfig, n_nodes: int) -> None:
    for spec in make_plan(config, n_nodes).stages:
        assert list(loaded(config, spec)) == list(stage_specs(config, spec, "bfloat16").items())


def loaded(config: ModelConfig, spec: StageSpec) -> list[tuple[str, TensorSpec]]:
    """What loading the stage gets, in order."""
    got: list[tuple[str, TensorSpec]] = []

    def get(name: str, shape: tuple[int, ...], dtype: str | None = None) -> Tensor:
        got.append((name, TensorSpec(shape, dtype or "bfloat16")))
        return torch.zeros(shape)

    load_stage(config, spec, torch.device("cpu"), Unquantized(get, torch.float32))
    return got


def test_a_tied_head_is_stored_as_the_embedding_and_another_by_its_own_name() -> None:
    head = StageSpec(0, 0, head=True)
    vocabulary, norm = TensorSpec((272, 64), "float32"), TensorSpec((64,), "float32")
    assert stage_specs(TEXT, head, "float32") == {FINAL_NORM: norm, EMBEDDING: vocabulary}
    assert stage_specs(UNTIED, head, "float32") == {FINAL_NORM: norm, LM_HEAD: vocabulary}


def test_q_and_k_norms_are_a_flag_and_two_names() -> None:
    layer = StageSpec(3, 4)
    plain, normed = (stage_specs(replace(TEXT, qk_norm=flag), layer, "float32") for flag in (False, True))
    names = [f"model.layers.3.self_attn.{which}_norm.weight" for which in "qk"]
    assert {name: spec for name, spec in normed.items() if name not in plain} == {
        name: TensorSpec((16,), "float32") for name in names
    }


def norms_of(specs: Specs) -> Specs:
    return {name: spec for name, spec in specs.items() if "norm" in name}


def test_a_stage_of_two_dtypes_counts_the_bytes_of_each() -> None:
    mixed = replace(TEXT, norm_dtype="float32")
    stage = StageSpec(0, 6, embedding=True, head=True)
    plain, both = (stage_specs(config, stage, "bfloat16") for config in (TEXT, mixed))
    assert {spec.dtype for spec in norms_of(both).values()} == {"float32"}
    assert {spec.dtype for name, spec in both.items() if name not in norms_of(both)} == {"bfloat16"}
    extra = 2 * 64 * (2 * 6 + 1)  # two bytes more for each number of two norms a layer and the final one
    assert total_bytes(both.values()) == total_bytes(plain.values()) + extra
    summaries = [stage_summary(config, stage, "bfloat16") for config in (TEXT, mixed)]
    assert summaries[1].size_bytes == summaries[0].size_bytes + extra
    assert summaries[1].step_bytes == summaries[0].step_bytes + extra
    assert summaries[1].parameters == summaries[0].parameters


QUANTIZED = ModelQuantization(layers="int4", head="int8", vision="int8")


def test_a_quantised_stage_counts_the_bytes_of_values_and_scales_and_the_parameters_of_before() -> None:
    stage = StageSpec.everything(VISION)
    plain, specs = stage_specs(VISION, stage, "bfloat16"), stage_specs(VISION, stage, "bfloat16", QUANTIZED)
    assert specs["model.layers.0.mlp.up_proj.weight"] == TensorSpec((128, 64), "int4")
    assert specs["visual.blocks.0.mlp.fc1.weight"].dtype == specs[LM_HEAD].dtype == "int8"
    assert specs[EMBEDDING] == plain[EMBEDDING]  # rows are looked up in it as before
    stored = stored_specs({name: specs[name] for name in ("model.layers.0.mlp.up_proj.weight", LM_HEAD)})
    assert stored == {
        "model.layers.0.mlp.up_proj.weight": TensorSpec((128, 32), "U8"),
        "model.layers.0.mlp.up_proj.weight_scale": TensorSpec((128, 2), "float16"),
        LM_HEAD: TensorSpec((272, 64), "I8"),
        "lm_head.weight_scale": TensorSpec((272, 1), "float32"),
    }
    assert total_bytes(stored_specs(specs).values()) == total_bytes(specs.values())
    assert total_size(specs.values()) - specs[LM_HEAD].size == total_size(plain.values())


def test_a_tied_head_that_is_not_quantised_stays_the_embedding() -> None:
    head = StageSpec(5, 6, head=True)
    specs = stage_specs(TEXT, head, "float32", ModelQuantization(layers="int8"))
    assert (EMBEDDING in specs, LM_HEAD in specs) == (True, False)


def test_a_matrix_whose_groups_would_not_cover_its_rows_is_not_quantised() -> None:
    odd = replace(TEXT, intermediate_size=72)
    specs = stage_specs(odd, StageSpec(0, 1), "float32", ModelQuantization(layers="int4"))
    dtypes = {name.split(".")[-2]: spec.dtype for name, spec in specs.items() if "proj" in name and "bias" not in name}
    assert dtypes.pop("down_proj") == "float32"  # its inputs are 72
    assert set(dtypes.values()) == {"int4"}
    narrow = replace(TEXT, hidden_size=72, n_heads=2, head_dim=36)
    assert LM_HEAD not in stage_specs(narrow, StageSpec(5, 6, head=True), "float32", ModelQuantization(head="int4"))


def test_a_matrix_that_is_kept_is_not_quantised() -> None:
    kept = "model.layers.0.self_attn.q_proj.weight"
    specs = stage_specs(TEXT, StageSpec(0, 1), "float32", ModelQuantization(layers="int8", kept=(kept,)))
    assert specs[kept].dtype == "float32"
    assert specs["model.layers.0.self_attn.k_proj.weight"].dtype == "int8"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="'int3' is unknown: use one of int8, int8-32, int4"):
        ModelQuantization(layers="int3")


def test_a_dtype_that_models_are_not_computed_in_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'int3' is not supported"):
        stage_specs(TEXT, StageSpec(0, 1), "int3")


def test_a_caller_may_change_what_it_is_given() -> None:
    stage_specs(TEXT, StageSpec(0, 1), "float32").clear()
    assert len(stage_specs(TEXT, StageSpec(0, 1), "float32")) == 12
