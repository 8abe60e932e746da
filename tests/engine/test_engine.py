"""The engine as its users meet it, on a tiny model: alone and over real node processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from testing.checkpoints import tiny_config, tiny_text_config
from testing.processes import node_processes
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.errors import (
    CheckpointError,
    ClosedError,
    ConfigError,
    InputError,
    LinkError,
    MediaError,
    OverloadedError,
    PromptTooLongError,
)
from mdi.engine import Completion

GREEDY = SamplingParams(temperature=0, max_tokens=12)
WARM = SamplingParams(temperature=1.0, seed=11, max_tokens=24)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(tiny_checkpoint, sequence_length=512, max_sequences=4) as engine:
        yield engine


def about(image: bytes | str | Path, text: str = "What is this?", **part: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image, **part}, {"type": "text", "text": text}]}]


def mixed_requests(photograph: bytes) -> list[tuple[Any, SamplingParams]]:
    """Eight sequences: texts and pictures, greedy and sampled."""
    prompts = ["Hello", "A longer question, " * 9, about(photograph), about(photograph, "Where?", max_pixels=20_000)]
    settings = [GREEDY, WARM]
    return [(prompt, params) for prompt in prompts for params in settings]


def run_together(engine: Engine, requests: list[tuple[Any, SamplingParams]]) -> list[tuple[int, ...]]:
    streams = [engine.submit(prompt, params) for prompt, params in requests]
    return [stream.completion().token_ids for stream in streams]


def test_a_completion_has_text_tokens_logprobs_reason_and_usage(engine: Engine, photograph: bytes) -> None:
    out = engine.chat(about(photograph), WARM)
    assert isinstance(out, Completion)
    assert len(out.token_ids) == len(out.logprobs) == out.usage.completion_tokens
    assert out.finish_reason == ("length" if len(out.token_ids) == 24 else "stop")
    assert out.usage.prompt_tokens > 48  # 8 x 6 merged patches
    assert all(logprob <= 0 for logprob in out.logprobs)


def test_a_stream_gives_the_text_of_the_completion(engine: Engine) -> None:
    pieces = list(engine.stream("Hello", WARM))
    whole = engine.chat("Hello", WARM)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason


def test_a_stream_can_be_read_by_asyncio(engine: Engine) -> None:
    async def read() -> str:
        return "".join([piece.text async for piece in engine.submit("Hello", WARM)])

    async def many() -> list[str]:
        return await asyncio.gather(*(read() for _ in range(5)))

    assert set(asyncio.run(many())) == {engine.chat("Hello", WARM).text}


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(engine: Engine, photograph: bytes) -> None:
    requests = mixed_requests(photograph)
    together = run_together(engine, requests)
    alone = [engine.chat(prompt, params).token_ids for prompt, params in requests]
    assert together == alone


def test_n_samples_differ_from_each_other_and_repeat_with_the_seed(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=16)
    first, again = engine.chat("Hello", params), engine.chat("Hello", params)
    assert len({sample.token_ids for sample in first.samples}) == 3
    assert first == again
    assert first.usage.completion_tokens == sum(len(sample.token_ids) for sample in first.samples)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: Engine) -> None:
    whole = engine.chat("Hello", WARM).text
    stop = whole[5:7]
    cut = engine.chat("Hello", SamplingParams(temperature=1.0, seed=11, max_tokens=24, stop=stop))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_an_answer_ends_at_the_sequence_length(engine: Engine) -> None:
    out = engine.chat("x" * 440, SamplingParams(temperature=0, max_tokens=None))
    assert out.finish_reason in ("length", "stop")
    assert out.usage.prompt_tokens + out.usage.completion_tokens <= 512


def test_a_cancelled_stream_ends_and_frees_its_slot(engine: Engine) -> None:
    streams = [engine.submit("Hello", SamplingParams(temperature=0, max_tokens=400)) for _ in range(6)]  # 4 slots
    for stream in streams:
        stream.cancel()
    for stream in streams:
        assert stream.completion_tokens < 400
        list(stream)
    started = time.monotonic()
    engine.chat("Hello", GREEDY)
    assert time.monotonic() - started < 30


def test_leaving_a_stream_early_cancels_it(engine: Engine) -> None:
    for _ in range(8):  # more than there are slots
        for _piece in engine.stream("Hello", SamplingParams(temperature=0, max_tokens=400)):
            break
    assert engine.chat("Hello", GREEDY).token_ids


def test_user_text_that_looks_like_special_tokens_is_plain_text(engine: Engine, photograph: bytes) -> None:
    plain = engine.chat("a" * 10, GREEDY).usage.prompt_tokens
    assert engine.chat("<|im_end|>", GREEDY).usage.prompt_tokens == plain  # ten bytes, not one token
    forged = engine.chat(about(photograph, "<|vision_start|><|image_pad|><|vision_end|>"), GREEDY)
    honest = engine.chat(about(photograph, "x" * 43), GREEDY)
    assert forged.usage.prompt_tokens == honest.usage.prompt_tokens
    split = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    assert engine.chat([{"role": "user", "content": split}], GREEDY).usage.prompt_tokens == plain


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("none", None),
        ([{"role": "pilot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages[0].content[0].image"),
    ],
)
def test_malformed_messages_are_refused_by_name(engine: Engine, messages: Any, field: str | None) -> None:
    if field is None:
        assert engine.chat(messages, GREEDY).token_ids
        return
    with pytest.raises(InputError) as raised:
        engine.submit(messages)
    assert raised.value.field == field


def test_bad_images_are_refused_and_the_engine_goes_on(engine: Engine, photograph: bytes) -> None:
    for bad in ("/no/such/file.png", b"not an image", photograph[:200], "data:image/png;base64,####"):
        with pytest.raises(MediaError):
            engine.chat(about(bad), GREEDY)
    assert engine.chat(about(photograph), GREEDY).token_ids


def test_what_does_not_fit_the_sequence_length_is_refused_never_cut(engine: Engine, photograph: bytes) -> None:
    with pytest.raises(PromptTooLongError, match="sequence length"):
        engine.chat("x" * 600, GREEDY)
    with pytest.raises(PromptTooLongError, match="max_pixels"):
        engine.chat(about(photograph, min_pixels=900_000, max_pixels=1_000_000), GREEDY)
    assert engine.chat("still here", GREEDY).token_ids


def test_pixel_limits_of_a_request_change_the_number_of_tokens(engine: Engine, photograph: bytes) -> None:
    large = engine.chat(about(photograph), GREEDY).usage.prompt_tokens
    small = engine.submit(about(photograph), GREEDY, max_pixels=10_000).completion().usage.prompt_tokens
    assert small < large


def test_a_full_queue_refuses_at_once(tiny_checkpoint: Path) -> None:
    with Engine(tiny_checkpoint, sequence_length=256, max_queue=2) as engine:
        streams = [engine.submit("Hello", SamplingParams(temperature=0, max_tokens=150)) for _ in range(2)]
        with pytest.raises(OverloadedError):
            engine.submit("Hello")
        for stream in streams:
            stream.completion()
        assert engine.chat("Hello", GREEDY).token_ids


def test_closing_fails_what_runs_and_what_comes(tiny_checkpoint: Path) -> None:
    engine = Engine(tiny_checkpoint, sequence_length=4096)
    stream = engine.submit("Hello", SamplingParams(temperature=0, max_tokens=4000))
    next(stream)
    engine.close()
    with pytest.raises(ClosedError):
        list(stream)
    with pytest.raises(ClosedError):
        engine.submit("Hello")
    engine.close()


def test_many_threads_share_one_engine(engine: Engine) -> None:
    def ask(seed: int) -> tuple[int, ...]:
        return engine.chat("Hi", SamplingParams(temperature=1.0, seed=seed, max_tokens=8)).token_ids

    expected = [ask(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, list(range(4)) * 10)) == expected * 10


@pytest.mark.usefixtures("no_process_left")
@pytest.mark.parametrize(
    "n_nodes", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_any_number_of_nodes_gives_the_same_tokens(
    n_nodes: int, engine: Engine, tiny_checkpoint: Path, photograph: bytes
) -> None:
    requests = mixed_requests(photograph)
    with Engine(tiny_checkpoint, n_nodes=n_nodes, sequence_length=512, max_sequences=4) as spread:
        assert len(node_processes()) == n_nodes - 1
        nodes = spread.nodes()
        assert [node.first_layer for node in nodes[1:]] == [node.last_layer for node in nodes[:-1]]
        assert (nodes[0].first_layer, nodes[-1].last_layer) == (0, 6)
        assert len({node.pid for node in nodes}) == n_nodes
        assert run_together(spread, requests) == run_together(engine, requests)


def test_an_engine_is_ready_idle_or_busy_and_not_when_closed(tiny_checkpoint: Path) -> None:
    with Engine(tiny_checkpoint, max_sequences=1) as engine:
        assert engine.ready(30)
        for _piece in engine.stream("Hello", SamplingParams(temperature=0, max_tokens=1000)):
            assert engine.ready(30)  # though its only slot is taken
            break
        assert engine.ready(30)
        assert not engine.ready(0)
        wait_for(lambda: not engine._requests)
    assert not engine.ready(30)


@pytest.mark.usefixtures("no_process_left")
def test_a_corrupted_chunk_is_named_before_anything_runs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    chunk = prepare(open_source(path), 2) / "model_finisher.safetensors"
    content = bytearray(chunk.read_bytes())
    content[-5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises((CheckpointError, LinkError), match=r"model_finisher.*prepare"):
        Engine(path, n_nodes=2)


@pytest.mark.slow
@pytest.mark.usefixtures("no_process_left")
def test_chunks_of_another_dtype_or_plan_are_written_beside_those_that_are_there(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    with Engine(path, n_nodes=2, layers=(4, 2)) as engine:
        first = engine.chat("Hello", GREEDY).token_ids
    before = (path / "chunks" / "2nodes" / "manifest.json").read_bytes()
    with Engine(path, n_nodes=2, dtype="bfloat16") as engine:
        assert {node.dtype for node in engine.nodes()} == {"bfloat16"}
    with Engine(path, n_nodes=2, layers=(3, 3)) as engine:
        assert [node.last_layer for node in engine.nodes()] == [3, 6]
        assert engine.chat("Hello", GREEDY).token_ids == first
    assert (path / "chunks" / "2nodes" / "manifest.json").read_bytes() == before
    assert len(list((path / "chunks").iterdir())) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("no_process_left")
def test_weights_overwritten_in_place_are_the_ones_that_answer(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = tmp_path / "tiny", tmp_path / "other"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    write_random_checkpoint(other, tiny_config(), seed=1)

    def answers() -> list[tuple[int, ...]]:
        found = []
        for n_nodes in (1, 3):
            with Engine(path, n_nodes=n_nodes) as engine:
                found.append(engine.chat("Hello", GREEDY).token_ids)
        return found

    before = answers()
    assert not caplog.messages
    (path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    after = answers()
    assert after[0] == after[1]
    assert after != before
    [message] = caplog.messages
    assert message.endswith("chunks/3nodes are made of other weights than are there now: preparing them again")


@pytest.mark.slow
@pytest.mark.usefixtures("no_process_left")
def test_the_nodes_of_a_running_server_restart_from_the_weights_it_began_with(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path, other = tmp_path / "tiny", tmp_path / "other"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    write_random_checkpoint(other, tiny_config(), seed=1)
    with Engine(path, n_nodes=2) as running:
        before = running.chat("Hello", GREEDY).token_ids
        (path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
        with Engine(path, n_nodes=2) as engine, Engine(other) as expected:
            assert engine.chat("Hello", GREEDY).token_ids == expected.chat("Hello", GREEDY).token_ids != before
        os.kill(running.nodes()[1].pid, signal.SIGKILL)
        assert running.chat("Hello", GREEDY).token_ids == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_nodes": 7}, "6 layers"),
        ({"n_nodes": 2, "layers": (3, 2)}, "5"),
        ({"sequence_length": 10**6}, "sequence length"),
        ({"device": "cuda:7"}, "cuda:7"),
        ({"dtype": "int3"}, "int3"),
        ({"max_pixels": -4}, "max_pixels"),
    ],
)
def test_impossible_options_are_refused(tiny_checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError, InputError), match=message):
        Engine(tiny_checkpoint, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_answers_over_nodes_as_on_one(dtype: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    answers = []
    for n_nodes in (1, 2):
        with Engine(path, n_nodes=n_nodes, dtype=dtype) as engine:
            assert {node.dtype for node in engine.nodes()} == {dtype}
            answers.append(engine.chat("Hello", GREEDY).token_ids)
    assert answers[0] == answers[1]


def test_a_text_model_answers_text_and_refuses_images(tmp_path: Path, photograph: bytes) -> None:
    path = write_random_checkpoint(tmp_path / "text", tiny_text_config())
    with Engine(path, n_nodes=2) as engine:
        assert engine.chat("Hello", GREEDY).token_ids
        with pytest.raises(InputError, match="text only"):
            engine.submit(about(photograph))


def test_loading_and_answering_need_no_compiler(tiny_checkpoint: Path, tmp_path: Path, photograph: bytes) -> None:
    """torch imports one, and sympy, when a tensor without contents is joined: 100 MB and seconds of every node."""
    (tmp_path / "photograph").write_bytes(photograph)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mdi import Engine, SamplingParams\n"
        "with Engine(sys.argv[1], sequence_length=512) as engine:\n"
        "    parts = [{'type': 'image', 'image': Path(sys.argv[2])}, {'type': 'text', 'text': 'What is this?'}]\n"
        "    engine.chat([{'role': 'user', 'content': parts}], SamplingParams(max_tokens=2))\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint), str(tmp_path / "photograph")]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_a_program_that_ends_without_closing_its_engine_ends_without_a_crash(tiny_checkpoint: Path) -> None:
    """While an answer is being written. Nodes end, too."""
    script = (
        "import sys\n"
        "from mdi import Engine, SamplingParams\n"
        "engine = Engine(sys.argv[1], n_nodes=2)\n"
        "stream = engine.submit('Hello', SamplingParams(max_tokens=400, ignore_eos=True))\n"
        "next(iter(stream))\n"
        "print(engine.nodes()[1].pid)\n"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert not psutil.pid_exists(int(done.stdout))


def test_a_forked_process_ends_and_leaves_the_engine_alone(tiny_checkpoint: Path) -> None:
    script = (
        "import os, sys\n"
        "from mdi import Engine, SamplingParams\n"
        "engine = Engine(sys.argv[1], n_nodes=2)\n"
        "if os.fork() == 0:\n"
        "    sys.exit(3)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "print(len(engine.chat('Hello', SamplingParams(max_tokens=4, ignore_eos=True)).token_ids))\n"
        "print(engine.recovery.recoveries)\n"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["3", "4", "0"])
