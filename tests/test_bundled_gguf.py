"""The bundled model as GGUF with its mmproj: the answers are those from safetensors, and llama.cpp's on these files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from testing.gguf_files import write_gguf, write_mmproj
from testing.llama_cpp import LlamaCpp

from mdi import Engine, SamplingParams
from mdi.checkpoint.bundled import SHIPPED
from mdi.cli.sample_questions import sample_questions

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SAMPLES = [sample for sample in sample_questions() if all(path.suffix == ".png" for path in sample.media)]
MAY_DIFFER = 1  # answers; perhaps because llama.cpp resizes pictures by another filter
FILES = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FILES:
    folder = tmp_path_factory.mktemp("files")
    return {
        kind: (
            write_gguf(SHIPPED, folder / f"{kind}.gguf", kind),
            write_mmproj(SHIPPED, folder / f"mmproj-{kind}.gguf", kind),
        )
        for kind in ("F32", "Q8_0")
    }


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def answers(model: Path, **settings: Any) -> list[str]:
    with Engine(model, **settings) as engine:
        return [engine.chat(sample.messages(), GREEDY).text for sample in SAMPLES]


def test_there_are_samples_with_one_image_and_with_two() -> None:
    assert {len(sample.media) for sample in SAMPLES} == {1, 2}


@pytest.mark.parametrize("n_nodes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_answers_are_those_from_safetensors(n_nodes: int, files: FILES) -> None:
    model, mmproj = files["F32"]
    expected = answers(SHIPPED, dtype="float32", n_nodes=n_nodes)
    assert answers(model, mmproj=mmproj, dtype="float32", n_nodes=n_nodes) == expected


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_answers_are_those_of_llama_cpp(kind: str, files: FILES) -> None:
    pytest.importorskip("xllamacpp")
    model, mmproj = files[kind]
    with LlamaCpp(model, mmproj) as theirs:
        expected = [theirs.answer(sample.messages(), GREEDY.max_tokens or 0) for sample in SAMPLES]
    pairs = list(zip(answers(model, mmproj=mmproj, dtype="float32"), expected, strict=True))
    equal = [ours for ours, other in pairs if ours == other]
    assert len(equal) >= len(SAMPLES) - MAY_DIFFER, pairs
