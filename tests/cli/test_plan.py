"""`mdi plan`: the split, and what a limit of the KV cache means for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from testing.links import free_port
from typer.testing import CliRunner

from mdi.checkpoint.published import QWEN3_30B_A3B
from mdi.checkpoint.writer import safetensors_header
from mdi.cli.app import app
from mdi.cluster import measure
from mdi.core.tensors import total_bytes
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.models.weights import stage_specs
from mdi.planning.hardware import Machine


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("starter", "0-5 (6)")),
        (("--n-nodes", "2"), ("starter", "finisher")),
        (("-tp", "2", "--n-nodes", "4"), ("secondary1", "(3), 1/2", "finisher")),
        (("--groups", "2,1", "--shards", "4", "--layers", "4,2"), ("0-3 (4), 2/4", "4-5 (2)")),
        (("--kv-cache-gb", "0.001"), ("KV cache: 640 tokens of all sequences together; one has 640 at most",)),
    ],
)
def test_a_plan_is_shown_without_measured_machines(
    tiny_checkpoint: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(app, ["plan", str(tiny_checkpoint), *options])
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in words)


def test_a_plan_is_json_for_programs(tiny_checkpoint: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(tiny_checkpoint), "--groups", "1,2", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.output)
    assert (plan["groups"], sum(plan["layers"]), plan["n_shards"], plan["plans"]) == ([1, 2], 6, 2, [])
    assert [node["name"] for node in plan["nodes"]] == ["starter", "secondary0", "finisher"]
    assert plan["nodes"][2]["rank"] == {"first_shard": 1, "last_shard": 2, "n_shards": 2}


def test_the_fastest_plan_of_measured_machines_is_shown_with_two_others(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure_hardware", lambda *_: Machine(1e6, 1e9))
    places = [{"addr": "127.0.0.1", "communication": {"port": free_port()}} for _ in range(3)]
    nodes = {"starter": places[0], "secondary": places[1:]}
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps({"nodes": nodes}))
    command = ["plan", str(tiny_checkpoint), "--nodes-config", str(file), "--json"]
    chosen = json.loads(CliRunner().invoke(app, command).stdout)
    assert chosen["plans"][0]["groups"] == chosen["groups"] == [3]
    assert [plan["token_s"] for plan in chosen["plans"]] == sorted(plan["token_s"] for plan in chosen["plans"])
    assert all(plan["why"] for plan in chosen["plans"])
    shown = CliRunner().invoke(app, command[:-1])
    assert all(
        word in " ".join(shown.output.split()) for word in ("a group of 3", "exchanges of", "0.2 ms, and 1 Gb/s")
    )
    given = json.loads(CliRunner().invoke(app, [*command, "--groups", "2,1"]).stdout)
    assert (given["groups"], given["plans"]) == ([2, 1], [])
    refused = CliRunner().invoke(app, [*command, "--groups", "2,2"])
    assert "groups 2,2 are 4 nodes in all, but there are 3" in str(refused.exception)


def test_a_30b_model_with_experts_is_planned_over_four_nodes(tmp_path: Path) -> None:
    config = read_config(QWEN3_30B_A3B)
    specs = stage_specs(config, StageSpec.everything(config), "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    with (tmp_path / "model.safetensors").open("wb") as file:  # 61 GB with a header and no data take no disk
        file.write(safetensors_header(specs, {}))
        file.truncate(file.tell() + total_bytes(specs.values()))
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--n-nodes", "4", "--quantization", "int4"])
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("0-12 (13)", "40-47 (8)", "each token chooses 8 of 128 experts"))
    assert "a step of one stream reads 1,7" in " ".join(done.output.split())
