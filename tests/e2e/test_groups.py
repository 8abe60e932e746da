"""A stage over several processes: the tokens and numbers of one node with as many shards, also after losses."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from testing.processes import node_processes
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.core.errors import ConfigError
from mdi.engine import Completion

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {"sequence_length": 2048, "max_sequences": 8}
Asked = list[tuple[Any, SamplingParams]]


@pytest.fixture(scope="module")
def asked(photograph: bytes) -> Asked:
    """Greedy and sampled, with an image, penalised, filtered, with logprobs, two samples, a long prompt."""
    image = [{"type": "image", "image": photograph}, {"type": "text", "text": "What is this?"}]
    return [
        ("Hello", SamplingParams(temperature=0, max_tokens=40)),
        ([{"role": "user", "content": image}], SamplingParams(temperature=0, max_tokens=40, top_logprobs=3)),
        ("many words, " * 150, SamplingParams(temperature=1, seed=1, max_tokens=40, n=2)),
        ("A list:", SamplingParams(temperature=1, seed=2, max_tokens=40, top_k=5, repetition_penalty=1.2)),
        ("A list:", SamplingParams(temperature=0.8, seed=3, max_tokens=40, top_p=0.7, logit_bias={11: 2.0})),
        ("A list:", SamplingParams(temperature=1.2, seed=4, max_tokens=40, min_p=0.1, frequency_penalty=0.5)),
    ]


def answers(engine: Engine, asked: Asked) -> list[list[Any]]:
    """Tokens and logprobs of all samples, from streams that run together."""
    completions = [stream.completion() for stream in [engine.submit(*request) for request in asked]]
    return [numbers(completion) for completion in completions]


def numbers(completion: Completion) -> list[Any]:
    return [(sample.token_ids, sample.logprobs) for sample in completion.samples]


@pytest.mark.parametrize(
    ("kind", "divisions"),
    [
        ({"dtype": "bfloat16"}, [(2,), (2, 1), (2, 2)]),
        ({"dtype": "float32"}, [(2, 2)]),
        ({"quantization": "int8"}, [(2,)]),
        ({"quantization": "int4"}, [(2, 1)]),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("no_process_left")
def test_groups_give_the_numbers_of_one_node(
    kind: dict[str, Any], divisions: list[tuple[int, ...]], asked: Asked
) -> None:
    with Engine("bundled", shards=2, **SETTINGS, **kind) as engine:
        alone = answers(engine, asked)
    for groups in divisions:
        with Engine("bundled", groups=groups, encryption=True, **SETTINGS, **kind) as engine:
            assert answers(engine, asked) == alone
            places = [(node.group, node.rank) for node in engine.nodes()]
            assert places == [(group, rank) for group, size in enumerate(groups) for rank in range(size)]


@pytest.fixture(scope="module")
def grouped() -> Iterator[Engine]:
    """Two stages of two ranks, in the bundled model's own type."""
    with Engine("bundled", n_nodes=4, groups=(2, 2), encryption=True, recovery_timeout_s=100, **SETTINGS) as engine:
        yield engine
    assert node_processes() == []


@pytest.mark.parametrize(
    ("name", "with_signal"),
    [("secondary0", signal.SIGKILL), ("secondary1", signal.SIGSTOP), ("finisher", signal.SIGKILL)],
    ids=["rank 1 of the starter's stage killed", "leader of the last stage frozen", "rank 1 of the last stage killed"],
)
def test_streams_survive_a_lost_rank_with_the_same_tokens(grouped: Engine, name: str, with_signal: int) -> None:
    params = [
        SamplingParams(temperature=number % 2, seed=number, max_tokens=150, ignore_eos=True) for number in range(4)
    ]
    undisturbed = [grouped.submit(f"Number {index}", one).completion().token_ids for index, one in enumerate(params)]
    recoveries = grouped.recovery.recoveries
    streams = [grouped.submit(f"Number {index}", one) for index, one in enumerate(params)]
    wait_for(lambda: all(stream.timing.first_token_s for stream in streams), 60)
    os.kill(next(node.pid for node in grouped.nodes() if node.name == name), with_signal)
    assert [stream.completion().token_ids for stream in streams] == undisturbed
    assert grouped.recovery.recoveries > recoveries
    assert grouped.recovery.failed_requests == 0


def test_a_group_that_the_model_cannot_be_cut_into_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shards|heads"):
        Engine("bundled", n_nodes=8, groups=(8,))
