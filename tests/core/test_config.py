"""One tree of settings: by section or by name, with defaults and meanings in one place, refused when out of range."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mdi.core.config import (
    CacheSettings,
    ClusterConfig,
    EngineConfig,
    GatewayConfig,
    ManualNodes,
    RecoveryLimits,
    Section,
    meaning,
)
from mdi.core.errors import ConfigError


def names(section: Section) -> list[str]:
    """The settings at any depth, without the sections."""
    found = list[str]()
    for item in fields(section):
        value = getattr(section, item.name)
        found += names(value) if isinstance(value, Section) else [item.name]
    return found


def test_settings_reach_their_sections_by_name() -> None:
    config = EngineConfig.of("bundled", n_nodes=3, dtype="float32", max_losses=2, media_dir=Path("pictures"))
    assert config.model.checkpoint == "bundled"
    assert config.model.dtype == "float32"
    assert config.cluster.n_nodes == 3
    assert config.cluster.recovery == RecoveryLimits(max_losses=2)
    assert config.media.media_dir == Path("pictures")
    assert config.media.any_file  # the default of the tree, which the other settings of media leave alone
    assert config.cache == CacheSettings()


def test_a_section_is_taken_whole_and_its_settings_still_count() -> None:
    config = EngineConfig.of("bundled", recovery=RecoveryLimits(recovery_timeout_s=9), max_losses=1)
    assert config.cluster.recovery == RecoveryLimits(recovery_timeout_s=9, max_losses=1)


def test_every_setting_has_a_name_of_its_own_and_a_meaning() -> None:
    found = names(EngineConfig.of("bundled"))
    assert [name for name, count in Counter(found).items() if count > 1] == []
    assert all(meaning(name).endswith(".") for name in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_node": 3}, "unknown setting n_node: did you mean n_nodes?"),
        ({"n_nodes": 0}, "n_nodes must be at least 1, got 0"),
        ({"zebra": 3}, "unknown setting zebra: see EngineConfig"),
        ({"n_nodes": "3"}, "n_nodes must be a whole number, got '3'"),
        ({"n_nodes": 2.5}, "n_nodes must be a whole number, got 2.5"),
        ({"max_sequences": True}, "max_sequences must be a whole number, got True"),
        ({"max_pixels": "many"}, "max_pixels must be a whole number, got 'many'"),
        ({"wait_s": "long"}, "wait_s must be a number, got 'long'"),
        ({"encryption": "yes"}, "encryption must be true or false, got 'yes'"),
        ({"dtype": "int3"}, "dtype must be one of float32, bfloat16, float16, got 'int3'"),
        ({"recovery_timeout_s": 0}, "recovery_timeout_s must be above 0, got 0"),
        ({"spare_after_s": math.nan}, "spare_after_s must be at least 0, got nan"),
        ({"nodes_config": Path("nodes.json"), "n_nodes": 2}, "the nodes-config says how many nodes there are"),
        ({"nodes_config": Path("nodes.json"), "layers": (3, 3)}, "the nodes-config says how many nodes there are"),
        ({"max_sequences": 600}, "a step of 512 tokens has none for each of 600 samples: raise batch_tokens"),
        ({"recovery": ManualNodes()}, "recovery must be of RecoveryLimits, got ManualNodes"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig.of("bundled", **settings)
    assert str(error.value).startswith(message)


def test_paths_may_be_strings() -> None:
    config = EngineConfig.of("bundled", ckpt_folder="models", nodes_config="nodes.json")
    assert config.model.ckpt_folder == Path("models")
    assert config.cluster.manual == ManualNodes(nodes_config=Path("nodes.json"))


def test_layers_may_be_any_sequence() -> None:
    assert ClusterConfig(n_nodes=2, layers=[4, 2]).layers == (4, 2)  # type: ignore[arg-type]
    assert EngineConfig.of("bundled", layers=[]).cluster.layers is None


@pytest.mark.parametrize(("wanted", "length"), [(None, 32_768), (2, 2), (50_000, 50_000)])
def test_the_sequence_length_fits_the_model(wanted: int | None, length: int) -> None:
    assert CacheSettings(wanted).sequence_length_for(50_000) == length
    assert CacheSettings(None).sequence_length_for(512) == 512


@pytest.mark.parametrize("wanted", [1, 5001])
def test_a_sequence_length_beyond_the_model_is_refused(wanted: int) -> None:
    with pytest.raises(ConfigError, match="between 2 and the model's 5000"):
        CacheSettings(wanted).sequence_length_for(5000)


def test_settings_of_the_server_have_their_meaning_and_are_checked_as_those_of_the_engine() -> None:
    assert meaning("strict_requests").startswith("Refuse unknown fields")
    with pytest.raises(ConfigError, match="strict_requests must be true or false"):
        GatewayConfig(strict_requests=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "n_nodes", "sizes"),
    [
        ({}, None, None),
        ({"n_nodes": 3}, 3, None),
        ({"tensor_parallel_size": 2}, 2, (2,)),
        ({"tensor_parallel_size": 2, "n_nodes": 4}, 4, (2, 2)),
        ({"pipeline_parallel_size": 3}, 3, None),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 3}, 6, (3, 3)),
        ({"pipeline_parallel_size": 2, "groups": (2, 1)}, 3, (2, 1)),
        ({"groups": (2, 1, 3)}, 6, (2, 1, 3)),
        ({"groups": (2, 1, 3), "n_nodes": 6}, 6, (2, 1, 3)),
        ({"groups": (1, 1)}, 2, (1, 1)),
    ],
)
def test_groups_say_how_many_nodes_there_are(
    settings: dict[str, Any], n_nodes: int | None, sizes: tuple[int, ...] | None
) -> None:
    cluster = EngineConfig.of("bundled", **settings).with_settings(shards=4).cluster
    assert (cluster.n_nodes, cluster.group_sizes) == (n_nodes, sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 2, "n_nodes": 3}, "--n-nodes 3 is no multiple of --tensor-parallel-size 2"),
        ({"tensor_parallel_size": 2, "n_nodes": 1}, "--n-nodes 1 is no multiple"),
        ({"tensor_parallel_size": 2, "groups": (2, 2)}, "both say how many nodes a stage has"),
        ({"groups": (2, 1), "n_nodes": 2}, "--groups 2,1 are 3 nodes in all, but --n-nodes says 2"),
        ({"pipeline_parallel_size": 2, "n_nodes": 3}, "--pipeline-parallel-size 2 makes 2 nodes, but --n-nodes says 3"),
        ({"pipeline_parallel_size": 2, "groups": (2,)}, "--groups names 1 stages, but --pipeline-parallel-size says 2"),
        ({"groups": (2, 0)}, "every stage needs at least one node"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
    ],
)
def test_groups_against_other_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.of("bundled", **settings)


@pytest.mark.parametrize("settings", [{"tensor_parallel_size": 2}, {"groups": (2,)}])
def test_a_nodes_config_says_the_groups(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="their layers and groups: leave these options out"):
        EngineConfig.of("bundled", nodes_config=Path("nodes.json"), **settings)
