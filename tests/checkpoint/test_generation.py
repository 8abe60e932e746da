"""Sampling defaults and end tokens come from generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mdi.checkpoint.generation import GENERATION_CONFIG, end_ids, generation_defaults
from mdi.checkpoint.source import Source
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.sampling import SamplingParams


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / GENERATION_CONFIG).write_text(json.dumps(config))


def test_without_the_file_or_without_sampling_defaults_are_greedy(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == SamplingParams(temperature=0.0)
    write(tmp_path, {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1})
    assert generation_defaults(tmp_path) == SamplingParams(temperature=0.0, repetition_penalty=1.1)


def test_sampling_defaults_are_transformers_where_the_file_is_silent(tmp_path: Path) -> None:
    write(tmp_path, {"do_sample": True, "top_p": 0.8})
    assert generation_defaults(tmp_path) == SamplingParams(temperature=1.0, top_k=50, top_p=0.8)


def test_defaults_may_come_from_another_folder_or_from_nowhere(tmp_path: Path) -> None:
    write(tmp_path, {"do_sample": True, "top_k": 3})
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match=r"there is no generation_config\.json in"):
        generation_defaults(tmp_path, str(other))
    write(other, {"do_sample": True, "temperature": 0.5, "top_k": 7})
    assert generation_defaults(tmp_path, str(other)) == SamplingParams(temperature=0.5, top_k=7, top_p=1.0)
    assert generation_defaults(tmp_path, "vllm") == SamplingParams(temperature=1.0)
    assert generation_defaults(tmp_path, "auto") == generation_defaults(tmp_path)


def test_end_ids_come_from_the_first_file_that_has_some(source: Source) -> None:
    assert end_ids(source) == {256, 258}
    write(source.path, {"eos_token_id": 7})
    assert end_ids(source) == {7}
    write(source.path, {})
    assert end_ids(source) == {258}


def test_a_damaged_file_and_a_wrong_value_are_named(tmp_path: Path) -> None:
    (tmp_path / GENERATION_CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not a valid JSON object: download it again"):
        generation_defaults(tmp_path)
    write(tmp_path, {"do_sample": True, "temperature": "warm"})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature should be .*'warm'"):
        generation_defaults(tmp_path)
