"""`mdi plan`: the split, and what a limit of the KV cache means for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdi.checkpoint.published import QWEN3_30B_A3B
from mdi.checkpoint.writer import safetensors_header
from mdi.cli.app import app
from mdi.core.tensors import total_bytes
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.models.weights import stage_specs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("starter", "0-5 (6)")),
        (("--n-nodes", "2"), ("starter", "finisher")),
        (("--kv-cache-gb", "0.001"), ("KV cache: 640 tokens of all sequences together; one has 640 at most",)),
    ],
)
def test_a_plan_is_shown_without_measured_machines(
    tiny_checkpoint: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(app, ["plan", str(tiny_checkpoint), *options])
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in words)


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
