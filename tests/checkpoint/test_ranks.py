"""The chunks of a group's ranks: put together they are the chunk of one node, in every format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from testing.adapters import write_adapter
from testing.checkpoints import tiny_config, tiny_text_config, tiny_windowed_config
from testing.gguf_files import write_gguf
from testing.quantized_files import Packer, write_quantized
from torch import Tensor

from mdi.checkpoint import prepare as prepare_module
from mdi.checkpoint.calibration import CalibratedWeights, CalibrationText
from mdi.checkpoint.gguf import gguf_folder
from mdi.checkpoint.loader import chunk_weights, load_chunk, load_source
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import Source, open_source
from mdi.checkpoint.weights import RoundedWeights
from mdi.core.batch import Slice
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.group import Rank
from mdi.core.quantization import UNQUANTIZED, ModelQuantization, Quantization, QuantizedTensor
from mdi.core.tensors import total_bytes
from mdi.layers import linear
from mdi.layers.attention import Layout
from mdi.layers.kv_cache import KVCache
from mdi.layers.mlp import MLP, Experts
from mdi.layers.rope import DecoderRope, text_positions
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, FINAL_NORM, LAYERS, LM_HEAD
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage, stage_specs
from mdi.planning.plan import Plan
from mdi.planning.predict import stage_summary

EVEN = {"num_attention_heads": 8, "head_dim": 32, "intermediate_size": 384, "num_hidden_layers": 2}
ODD = {**EVEN, "num_attention_heads": 12, "vocab_size": 281}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": tiny_text_config("qwen2", **ODD, tie_word_embeddings=False),
    "qwen3": tiny_text_config("qwen3", **ODD),
    "qwen2_vl": tiny_config(**EVEN, **ROPE, hidden_size=256),
    "qwen2_vl untied": tiny_config(**EVEN, **ROPE, hidden_size=256, tie_word_embeddings=False),
    "qwen2_5_vl": tiny_windowed_config(**EVEN),
    "qwen3_moe": tiny_text_config(
        "qwen3_moe", **ODD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=320, mlp_only_layers=[1]
    ),
}
del CONFIGS["qwen2_5_vl"]["rope_scaling"], CONFIGS["qwen2_5_vl"]["head_dim"]
CONFIGS["qwen2_5_vl"] |= {"num_attention_heads": 4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
FORMATS = {
    "float32": ("float32", UNQUANTIZED),
    "bfloat16": ("bfloat16", UNQUANTIZED),
    "int8": ("bfloat16", ModelQuantization("int8", "int8")),
    "int4": ("float32", ModelQuantization("int4", "int8", "int4")),
}
SHORT = CalibrationText("short", CalibrationText.default().text[:4200])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    folder = tmp_path_factory.mktemp("ranks")

    def opened(name: str) -> Source:
        if not (folder / name).exists():
            write_random_checkpoint(folder / name, CONFIGS[name])
        return open_source(folder / name)

    return opened


@pytest.fixture
def prepare_group(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`prepare` for stages of ranks, given by the shards of each."""

    def made(source: Source, *stages: Sequence[int], **kind: Any) -> Path:
        plan = Plan(tuple(spec for specs in group_specs(source.model_config, *stages) for spec in specs))
        monkeypatch.setattr(prepare_module, "make_plan", lambda *_args, **_options: plan)
        return prepare(source, plan.n_nodes, **kind)

    monkeypatch.setattr(Plan, "__post_init__", lambda _: None)  # which knows no ranks
    return made


def ranks(*shards: int) -> list[Rank]:
    """Of a group, by how many shards each has."""
    return [Rank(sum(shards[:index]), sum(shards[: index + 1]), sum(shards)) for index in range(len(shards))]


def group_specs(config: ModelConfig, *stages: Sequence[int]) -> list[list[StageSpec]]:
    """Stages of as many layers each."""
    each, last = config.n_layers // len(stages), len(stages) - 1
    return [
        [
            StageSpec(
                each * index,
                each * (index + 1),
                embedding=index == 0 and rank.leads,
                vision=index == 0 and rank.leads and config.vision is not None,
                head=index == last,
                rank=rank,
            )
            for rank in ranks(*shards)
        ]
        for index, shards in enumerate(stages)
    ]


def assert_together_whole(config: ModelConfig, parts: Sequence[dict[str, Tensor]], whole: dict[str, Tensor]) -> None:
    """parts: the tensors of each rank of one stage. whole: those of one node, dequantised as they are."""
    for name, tensor in whole.items():
        module = name.split(".")[-2]
        found = [part[name] for part in parts if name in part]
        if module in ("k_proj", "v_proj") and name.startswith(LAYERS):
            assert_kv_heads(config, [(part[query(name)], part[name]) for part in parts], tensor)
        elif module in ("q_proj", "gate_proj", "up_proj", "lm_head") and name.startswith((LAYERS, LM_HEAD)):
            assert torch.equal(torch.cat(found), tensor), name
        elif module in ("o_proj", "down_proj") and name.startswith(LAYERS):
            assert torch.equal(torch.cat(found, 1), tensor), name
        elif name == EMBEDDING and len(found) > 1:  # the others have their rows of it for the head
            assert torch.equal(found[0], tensor)
            rows = tensor[len(tensor) - sum(map(len, found[1:])) :]
            assert torch.equal(torch.cat(found[1:]), rows)
        elif name.startswith(LAYERS) or name == FINAL_NORM:
            assert len(found) == len(parts)
            assert all(torch.equal(part, tensor) for part in found), name
        else:  # the embedding and the vision tower
            assert len(found) == 1
            assert torch.equal(found[0], tensor), name


def query(name: str) -> str:
    return name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")


def assert_kv_heads(config: ModelConfig, pairs: Sequence[tuple[Tensor, Tensor]], whole: Tensor) -> None:
    """Each query head finds, by its place among its rank's, the KV head that it uses in the model."""
    first, by_head = 0, whole.view(config.n_kv_heads, config.head_dim, -1)
    for queries, kv in pairs:
        n_heads, own = len(queries) // config.head_dim, kv.view(-1, config.head_dim, by_head.shape[2])
        for head in range(n_heads):
            used = by_head[(first + head) // (config.n_heads // config.n_kv_heads)]
            assert torch.equal(own[head // (n_heads // len(own))], used)
        first += n_heads
    assert first == config.n_heads


def files_of(folder: Path) -> list[Path]:
    return [folder / chunk.file for chunk in Manifest.read(folder).chunks]


@pytest.mark.parametrize("shards", [(1, 1), (1, 1, 1), (1, 1, 1, 1), (1, 3), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_ranks_chunks_together_are_the_one_node_s(
    name: str,
    format_: str,
    shards: tuple[int, ...],
    checkpoints: Callable[[str], Source],
    prepare_group: Callable[..., Path],
) -> None:
    source, (dtype, quantization) = checkpoints(name), FORMATS[format_]
    kind: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
    if name == "qwen2_5_vl" and format_ == "int8" and sum(shards) > 1:
        pytest.skip("its attention has one group of activations")
    [whole] = files_of(prepare(source, 1, **kind))
    one, manifest = dict(chunk_weights(whole)), Manifest.read(whole.parent)
    files = files_of(prepare_group(source, shards, **kind))
    parts = [dict(chunk_weights(file)) for file in files]
    assert_together_whole(source.model_config, parts, one)
    group = Manifest.read(files[0].parent)
    assert [chunk.rank for chunk in group.chunks] == ranks(*shards)
    assert group.plan_hash != manifest.plan_hash
