"""Quantised models as they are used: real processes, the bundled model, the command line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from testing.manual_cluster import NODES, ManualCluster, on_loopback
from testing.processes import mdi
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.bundled import unpack
from mdi.checkpoint.calibration import CalibrationText
from mdi.checkpoint.manifest import Manifest, chunk_file
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.cli.sample_questions import AnsweredQuestion, sample_questions
from mdi.core.config import RecoveryLimits
from mdi.core.quantization import ModelQuantization

GREEDY = SamplingParams(temperature=0, max_tokens=64)
LONG = ("Many words, " * 40, SamplingParams(temperature=1, seed=3, max_tokens=400, ignore_eos=True))
FORMATS: dict[str, Any] = {"quantization": "int4", "head_quantization": "int8", "vision_quantization": "int4"}


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny", ignore=shutil.ignore_patterns("chunks")))


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.slow
def test_plan_and_prepare_count_quantised_bytes(checkpoint: Path) -> None:
    options = ("--n-nodes", "2", "--dtype", "bfloat16", "--quantization", "int4", "--vision-quantization", "int8")
    shown = mdi("plan", checkpoint, *options)
    written = mdi("prepare", checkpoint, *options)
    assert (shown.returncode, written.returncode) == (0, 0), shown.stderr + written.stderr
    assert "2 chunks in" in written.stdout
    manifest = Manifest.read(checkpoint / "chunks" / "2nodes")
    assert manifest.quantization == ModelQuantization("int4", "int4", "int8")
    for chunk in manifest.chunks:
        row = next(line for line in shown.stdout.splitlines() if chunk.role in line)
        size_mb = re.search(r"(\d+)\s+\d+%", row)  # before its share of a step
        assert size_mb
        assert int(size_mb[1]) == pytest.approx(chunk.size_bytes / 1e6, abs=0.6)


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["int8", "int4"])
def test_the_bundled_model_answers_its_sample_questions_and_says_how_it_is_quantised(
    format_: str, tmp_path: Path
) -> None:
    quantization: dict[str, Any] = {"quantization": format_, "vision_quantization": format_}
    with Engine(unpack(tmp_path / "bundled"), **quantization) as engine:
        answers = [
            AnsweredQuestion(sample, engine.chat(sample.messages(), GREEDY).text, 0.0) for sample in sample_questions()
        ]
        assert sum(answer.right for answer in answers) >= len(answers) - (format_ == "int4")
        assert engine.nodes()[0].quantization == ModelQuantization(format_, format_, format_)


@pytest.mark.slow
def test_nodes_are_sent_quantised_chunks_and_a_lost_one_gets_its_own_again(
    checkpoint: Path, tmp_path: Path, undo: ExitStack
) -> None:
    with Engine(checkpoint, **FORMATS) as alone:
        undisturbed = alone.submit(*LONG).completion().samples[0].token_ids
    formats, text = ModelQuantization("int4", "int8", "int4"), CalibrationText.default()  # as for `alone`
    folder = prepare(open_source(checkpoint), 3, quantization=formats, calibration=text)
    nodes = undo.enter_context(ManualCluster(tmp_path, on_loopback(*NODES)))
    processes = nodes.start_all()
    limits = replace(RecoveryLimits(), recovery_timeout_s=100)
    engine = undo.enter_context(
        Engine(checkpoint, nodes_config=nodes.config, wait_s=100, spare_after_s=60, recovery=limits, **FORMATS)
    )
    stream = engine.submit(*LONG)
    wait_for(lambda: stream.completion_tokens > 20)
    processes["finisher"].kill()
    shutil.rmtree(nodes.cache("finisher"))
    again = nodes.start("finisher")
    assert stream.completion().samples[0].token_ids == undisturbed
    assert again.wait_for_line("receiving weights: done")
    for name in NODES:
        [sent] = nodes.cache(name).glob(f"*/{chunk_file(name)}")
        assert sent.read_bytes() == (folder / chunk_file(name)).read_bytes()
