"""Bytes and seconds of stages, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mdi.checkpoint.published import QWEN2_VL_2B, QWEN3_30B_A3B
from mdi.core.group import Rank
from mdi.core.quantization import ModelQuantization
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.planning.hardware import Machine
from mdi.planning.plan import make_plan
from mdi.planning.predict import PROMPT_TOKENS, VISION_SHARE, NodeNeeds, StageLoad, layer_summary, stage_summary

FULL_SIZE = read_config(QWEN2_VL_2B)
EXPERTS = read_config(QWEN3_30B_A3B)


def test_the_head_of_the_2b_model_weighs_about_five_layers() -> None:
    head = stage_summary(FULL_SIZE, StageSpec(0, 0, head=True), "bfloat16")
    layer = stage_summary(FULL_SIZE, StageSpec(0, 1), "bfloat16")
    assert 4.5 < head.step_bytes / layer.step_bytes < 5.5


def test_the_2b_plan_on_three_nodes_accounts_for_every_parameter() -> None:
    stages = make_plan(FULL_SIZE, 3).stages
    summaries = [stage_summary(FULL_SIZE, stage, "bfloat16") for stage in stages]
    stored_twice = FULL_SIZE.vocab_size * FULL_SIZE.hidden_size  # the tied matrix, on the first and the last node
    assert sum(summary.parameters for summary in summaries) == 2_208_985_600 + stored_twice
    assert [summary.size_bytes for summary in summaries] == [2 * summary.parameters for summary in summaries]
    assert sum(summary.step_share for summary in summaries) == pytest.approx(1)
    assert max(summary.step_share for summary in summaries) < 0.36


def test_the_cache_takes_keys_and_values_of_every_layer_in_the_stage_s_dtype() -> None:
    summary = stage_summary(FULL_SIZE, StageSpec(3, 8), "bfloat16", cache_tokens=1000)
    assert summary.cache_bytes == 5 * 1000 * 2 * FULL_SIZE.kv_size * 2
    assert summary.memory_bytes == summary.size_bytes + summary.cache_bytes
    assert stage_summary(FULL_SIZE, StageSpec(0, 0, head=True), "bfloat16", 1000).cache_bytes == 0


@pytest.mark.parametrize(("rank", "n_kv_heads"), [(Rank(0, 1, 3), 1), (Rank(1, 2, 3), 2), (Rank(1, 4, 4), 3)])
def test_a_rank_counts_its_own_weights_and_kv_heads(rank: Rank, n_kv_heads: int) -> None:
    stage = StageSpec(0, FULL_SIZE.n_layers, head=True)
    summary, whole = (
        stage_summary(FULL_SIZE, replace(stage, rank=rank), "bfloat16", cache_tokens=1000) for rank in (rank, None)
    )
    assert summary.cache_bytes == 28 * 1000 * 2 * n_kv_heads * 128 * 2
    share = len(rank.shards) / rank.n_shards
    assert summary.step_bytes == summary.size_bytes  # it has neither the embedding nor the tower
    assert share < summary.step_bytes / whole.step_bytes < 1.03 * share  # and norms and copies of KV heads


def test_a_step_reads_no_embedding_and_little_of_the_vision_tower() -> None:
    embedding, vision = StageSpec(0, 0, embedding=True), StageSpec(0, 0, vision=True)
    assert stage_summary(FULL_SIZE, embedding, "bfloat16").step_bytes == 0
    summary = stage_summary(FULL_SIZE, vision, "bfloat16")
    assert summary.step_bytes == pytest.approx(VISION_SHARE * summary.size_bytes)
    layers = stage_summary(FULL_SIZE, StageSpec(0, 4), "bfloat16")
    assert (layers.step_parameters, layers.step_bytes) == (layers.parameters, layers.size_bytes)


def test_tensors_of_another_dtype_count_their_own_bytes_in_memory_and_in_a_step() -> None:
    mixed = replace(FULL_SIZE, norm_dtype="float32")
    plain, both = (stage_summary(config, StageSpec(0, 3), "bfloat16") for config in (FULL_SIZE, mixed))
    assert both.size_bytes - plain.size_bytes == both.step_bytes - plain.step_bytes == 3 * 2 * 2 * FULL_SIZE.hidden_size
    assert both.parameters == plain.parameters


def test_seconds_are_of_reading_for_the_answer_and_of_computing_for_the_prompt() -> None:
    summary = stage_summary(FULL_SIZE, StageSpec(0, 4), "bfloat16")
    reading = summary.size_bytes / 10e9
    assert summary.token_s(Machine(10e9)) == pytest.approx(reading)
    computing = PROMPT_TOKENS * 2 * summary.parameters / 1e12
    assert summary.token_s(Machine(10e9, 1e12)) == pytest.approx(reading + computing)


def test_a_node_has_room_for_the_layers_that_fit_beside_what_it_has_anyway() -> None:
    head, layer = (
        stage_summary(FULL_SIZE, spec, "bfloat16", 4096) for spec in (StageSpec(0, 0, head=True), StageSpec(0, 1))
    )
    needs = NodeNeeds(head, layer)
    for fitting in (0, 1, 7, 28):
        machine = Machine(memory_bytes=needs.memory_bytes(fitting))
        assert needs.load(machine, 28).most == fitting
    assert needs.load(Machine(memory_bytes=1), 28).most == 0
    assert needs.load(Machine(), 28).most == 28


def test_a_stage_s_cost_grows_by_layers() -> None:
    assert [StageLoad(2.0, 0.5, 9).cost(count) for count in (0, 1, 4)] == [2.0, 2.5, 4.0]


def test_memory_holds_all_experts_and_a_step_reads_those_of_its_tokens() -> None:
    layer, expert = StageSpec(3, 4), 3 * 2048 * 768
    summary = stage_summary(EXPERTS, layer, "bfloat16")
    others = summary.parameters - 128 * expert
    assert summary.size_bytes == 2 * summary.parameters
    assert summary.step_parameters == others + 8 * expert
    for streams, distinct in ((1, 8), (2, 15.5), (4, 29.1), (1000, 128)):
        many = stage_summary(EXPERTS, layer, "bfloat16", streams=streams)
        assert many.step_bytes == pytest.approx(2 * (others + distinct * expert), rel=1e-3)
        assert many.step_parameters == summary.step_parameters  # what a token of a prompt is multiplied with


def test_a_30b_model_with_experts_is_split_over_four_nodes_by_what_a_step_reads() -> None:
    int4 = ModelQuantization("int4", "int4")
    plan = make_plan(EXPERTS, 4, dtype="bfloat16", quantization=int4)
    stages = [stage_summary(EXPERTS, stage, "bfloat16", quantization=int4) for stage in plan.stages]
    assert sum(stage.parameters for stage in stages) == 30_532_122_624
    assert max(stage.step_share for stage in stages) < 0.27
    assert 16e9 < sum(stage.size_bytes for stage in stages) < 18e9
    assert 1.6e9 < sum(stage.step_bytes for stage in stages) < 1.8e9


def test_layers_of_two_kinds_are_planned_with_room_for_the_larger_and_the_time_of_the_mean() -> None:
    assert EXPERTS.experts
    mixed = replace(EXPERTS, experts=replace(EXPERTS.experts, layers=tuple(range(0, 48, 3))))
    layer = layer_summary(mixed, "bfloat16", 1000)
    everything = stage_summary(mixed, StageSpec(0, 48), "bfloat16")
    assert layer.step_bytes == pytest.approx(everything.step_bytes / 48)
    assert layer.size_bytes == stage_summary(mixed, StageSpec(0, 1), "bfloat16").size_bytes
    dense = stage_summary(mixed, StageSpec(1, 2), "bfloat16")
    assert everything.size_bytes == 16 * layer.size_bytes + 32 * dense.size_bytes
