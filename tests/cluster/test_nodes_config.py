"""The nodes-config: upstream's files are read, and what is wrong in one is named by its key."""

from __future__ import annotations

import copy
import json
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdi.cluster.nodes_config import MAX_FILE_BYTES, NodesConfig
from mdi.core.errors import ConfigError

UPSTREAM: dict[str, Any] = {
    "nodes": {
        "starter": {
            "addr": "10.7.48.46",
            "communication": {"port": 8088},
            "inference": {"port_in": 5088, "port_out": 5089},
            "device": "cuda",
        },
        "secondary": [
            {
                "addr": "10.7.48.12",
                "communication": {"starter_addr": "10.7.48.46", "port": 8089},
                "inference": {"port_in": 5090, "port_out": 5091},
                "device": "cuda",
            },
            {
                "addr": "10.7.48.12",
                "starter_server": {"addr": "10.7.48.46", "port": 8088},
                "communication": {"port": 8090},
                "inference": {"port_in": 5092, "port_out": 5093},
            },
        ],
    }
}
STARTER, FIRST, LAST = ("nodes", "starter"), ("nodes", "secondary", 0), ("nodes", "secondary", 1)
GONE = object()


def changed(*changes: tuple[tuple[str | int, ...], Any]) -> bytes:
    document: Any = copy.deepcopy(UPSTREAM)
    for path, value in changes:
        place = document
        for step in path[:-1]:
            place = place[step]
        if value is GONE:
            del place[path[-1]]
        else:
            place[path[-1]] = value
    return json.dumps(document).encode()


def node(addr: str, **more: Any) -> dict[str, Any]:
    return {"addr": addr, "communication": {"port": 5000}, **more}


def test_upstreams_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    path.write_bytes(changed())
    config = NodesConfig.read(path)
    assert (config.starter.name, config.starter.device) == ("starter", "cuda")
    assert [(one.name, one.address, one.device) for one in config.pipeline] == [
        ("secondary0", "10.7.48.12:8089", "cuda"),
        ("finisher", "10.7.48.12:8090", None),
    ]
    assert (config.n_nodes, config.layers, config.vision, config.spares) == (3, None, None, ())
    assert config.node(1).key == "nodes.secondary[1]"


def test_a_finisher_of_its_own_comes_after_the_secondaries() -> None:
    config = NodesConfig.parse(changed((("nodes", "finisher"), node("fe80::1")), (("nodes", "vision"), node("v"))))
    assert [one.name for one in config.pipeline] == ["secondary0", "secondary1", "finisher"]
    assert config.pipeline[2].address == "[fe80::1]:5000"
    assert config.vision
    assert config.vision.name == "vision"


def test_a_starter_alone_is_a_pipeline_of_one() -> None:
    config = NodesConfig.parse(changed((("nodes", "secondary"), [])))
    assert (config.n_nodes, config.pipeline) == (1, ())


def test_what_a_node_computes_with_is_read() -> None:
    config = NodesConfig.parse(
        changed(
            ((*STARTER, "layers"), 1),
            ((*FIRST, "layers"), 3),
            ((*LAST, "layers"), 2),
            ((*LAST, "dtype"), "bfloat16"),
            ((*LAST, "threads"), 4),
            ((*LAST, "memory_gb"), 3.5),
            (("nodes", "spare"), [node("10.0.0.9", device="cpu")]),
        )
    )
    last = config.node(1)
    assert (last.dtype, last.threads, last.memory_gb) == ("bfloat16", 4, 3.5)
    assert config.layers == (1, 3, 2)
    assert [spare.name for spare in config.spares] == ["spare0"]
    fewer = config.without([1])
    assert [node.name for node in fewer.pipeline] == [config.node(1).name]
    assert [spare.name for spare in fewer.spares] == ["spare0", config.node(0).name]
    config.check_layers(6)
    with pytest.raises(ConfigError, match=r"nodes\.\*\.layers add up to 1 \+ 3 \+ 2 = 6, but the model has 28"):
        config.check_layers(28)


def test_neighbours_with_one_number_are_a_group() -> None:
    config = NodesConfig.parse(
        changed(
            *(((*place, "group"), number) for place, number in ((STARTER, 5), (FIRST, 5), (LAST, 0))),
            *(((*place, "layers"), count) for place, count in ((STARTER, 20), (FIRST, 20), (LAST, 8))),
        )
    )
    assert [[node.name for node in stage] for stage in config.stages] == [["starter", "secondary0"], ["finisher"]]
    assert (config.groups, config.layers, config.n_nodes) == ((2, 1), (20, 8), 3)
    config.check_layers(28)


def test_without_groups_each_node_is_a_stage() -> None:
    config = NodesConfig.parse(changed())
    assert (config.groups, len(config.stages)) == (None, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((((*FIRST, "group"), 1),), "nodes.starter.group is missing: all nodes have it, or none"),
        (
            tuple(((*place, "group"), number) for place, number in ((STARTER, 1), (FIRST, 2), (LAST, 1))),
            "nodes.secondary[1].group is 1, as nodes.starter.group is, and a node between them has another",
        ),
        (
            (
                *(((*place, "group"), 1) for place in (STARTER, FIRST, LAST)),
                *(((*place, "layers"), count) for place, count in ((STARTER, 6), (FIRST, 6), (LAST, 5))),
            ),
            "nodes.secondary[1].layers must be 6, as nodes.starter.layers is, which is of the same group: got 5",
        ),
        ((((*FIRST, "group"), -1),), "nodes.secondary[0].group must be a whole number from 0 to 1024, got -1"),
        (((("nodes", "spare"), [node("x", group=1)]),), "nodes.spare[0].group is unknown"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        NodesConfig.parse(changed(*changes))


def test_more_stages_than_layers_are_refused_and_more_nodes_are_not() -> None:
    one_stage = tuple(((*place, "group"), 1) for place in (STARTER, FIRST, LAST))
    NodesConfig.parse(changed(*one_stage)).check_layers(2)
    two_stages = NodesConfig.parse(changed(*one_stage, ((*LAST, "group"), 2)))
    with pytest.raises(ConfigError, match="2 stages, more than the model's 1"):
        two_stages.check_layers(1)


def test_more_nodes_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 nodes, more than the model's 2"):
        NodesConfig.parse(changed()).check_layers(2)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*LAST, "communication", "port"), 0, "nodes.secondary[1].communication.port must be a whole number from 1"),
        ((*LAST, "communication", "port"), 65536, "65535, got 65536"),
        ((*LAST, "communication", "port"), True, "nodes.secondary[1].communication.port must be a whole number"),
        ((*LAST, "communication", "port"), "8090", 'got "8090"'),
        ((*LAST, "communication", "port"), 8090.0, "got 8090.0"),
        ((*LAST, "communication", "port"), 10**30, "got a huge number"),
        ((*LAST, "communication", "port"), 8089, "nodes.secondary[1] is at 10.7.48.12:8089, where nodes.secondary[0]"),
        ((*FIRST, "communication", "prot"), 1, "communication.prot is unknown: did you mean port?"),
        ((*FIRST, "communication"), GONE, "nodes.secondary[0].communication is missing"),
        ((*FIRST, "communication"), [], "nodes.secondary[0].communication must be an object, got a list"),
        ((*FIRST, "divice"), "cpu", "nodes.secondary[0].divice is unknown: did you mean device?"),
        ((*FIRST, "xyz"), 1, "nodes.secondary[0].xyz is unknown: it has addr, communication"),
        ((*FIRST, "device"), "", "nodes.secondary[0].device must be a word"),
        ((*FIRST, "dtype"), "int4", 'nodes.secondary[0].dtype must be one of float32, bfloat16, float16, got "int4"'),
        ((*FIRST, "threads"), 0, "nodes.secondary[0].threads"),
        ((*FIRST, "memory_gb"), -1, "nodes.secondary[0].memory_gb must be a number above 0"),
        ((*FIRST, "memory_gb"), float("nan"), "nodes.secondary[0].memory_gb must be a number above 0, got NaN"),
        ((*FIRST, "memory_gb"), True, "nodes.secondary[0].memory_gb"),
        ((*FIRST, "layers"), 4, "nodes.starter.layers is missing: all nodes have it, or none"),
        ((*FIRST, "addr"), GONE, "nodes.secondary[0].addr is missing"),
        ((*FIRST, "addr"), "10.0.0.1:80", "nodes.secondary[0].addr must be a host's name or IP address, without port"),
        ((*FIRST, "addr"), "http://host", "nodes.secondary[0].addr must be"),
        ((*FIRST, "addr"), "0.0.0.0", "nodes.secondary[0].addr must be an address that the other nodes can reach"),
        ((*FIRST, "addr"), "", "nodes.secondary[0].addr must be"),
        ((*STARTER, "addr"), 5, "nodes.starter.addr must be"),
        (STARTER, GONE, "nodes.starter is missing"),
        (("nodes", "secondary"), {}, "nodes.secondary must be a list of nodes, got an object"),
        (("nodes", "secondary"), [5] * 2000, "nodes.secondary must have at most 1024 nodes"),
        (("nodes", "secondaries"), [], "nodes.secondaries is unknown: did you mean secondary?"),
        (("nodes", "spare"), [node("x", layers=1)], "nodes.spare[0].layers is unknown"),
        (("nodes",), GONE, "nodes is missing"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        NodesConfig.parse(changed((path, value)))
    assert message in str(refused.value)


def test_nodes_of_different_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"nodes\.secondary\[1\]\.dtype must be float32, as nodes\.starter\.dtype is"):
        NodesConfig.parse(changed(((*STARTER, "dtype"), "float32"), ((*LAST, "dtype"), "float16")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"nodes": 1, "nodes": 2}', 'the key "nodes" appears twice'),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 10_000, "is not JSON"),
        (b" " * (MAX_FILE_BYTES + 1), "is larger than"),
        (b"[]", "the file must be an object"),
    ],
)
def test_what_is_no_nodes_config_at_all_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NodesConfig.parse(data)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json.*No such file"):
        NodesConfig.read(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        NodesConfig.read(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^bad\.json: is not JSON"):
        NodesConfig.read(tmp_path / "bad.json")


@pytest.mark.parametrize("index", [-1, 2])
def test_a_node_that_the_file_does_not_have_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match=rf"no node {index} .*0 \(secondary0\), 1 \(finisher\)"):
        NodesConfig.parse(changed()).node(index)


KEYS = ["nodes", "starter", "secondary", "finisher", "vision", "spare", "addr", "communication", "port", "device"]
KEYS += ["dtype", "threads", "memory_gb", "layers", "inference", "\ud800"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["a", "::1"])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=5),
    max_leaves=20,
)
PATHS = st.sampled_from(
    [STARTER, FIRST, LAST, (*STARTER, "addr"), (*LAST, "communication"), (*LAST, "communication", "port")]
    + [(*FIRST, key) for key in KEYS]
    + [("nodes", key) for key in KEYS]
)


def at_the_limit(text: str) -> bytes:
    """A file as large as may be, of one text after the other; "#" is their number."""
    parts, size = list[str](), 0
    while size + len(text) + 10 < MAX_FILE_BYTES:
        parts.append(text.replace("#", str(len(parts))))
        size += len(parts[-1])
    return "".join(parts).encode()


LARGE = {
    "keys": b'{"a": 1' + at_the_limit(', "#": 0') + b"}",
    "keys twice": b'{"a": 1' + at_the_limit(', "#": 0')[:-20] + b', "a": 1}',
    "one key": b'{"' + at_the_limit("k") + b'": 0}',
    "an address": changed(((*FIRST, "addr"), "A" + "-a" * 400_000)),
    "an address of dots": changed(((*FIRST, "addr"), "a." * 400_000)),
    "spares": changed((("nodes", "spare"), [])).replace(b'"spare": []', b'"spare": [1' + at_the_limit(", 1") + b"]"),
    "lists": at_the_limit("["),
    "objects": at_the_limit('{"nodes":'),
    "digits": at_the_limit("1234567890"),
}


@pytest.mark.parametrize("data", LARGE.values(), ids=LARGE)
def test_a_large_file_is_refused_at_once_in_little_memory_and_few_words(data: bytes) -> None:
    assert len(data) > MAX_FILE_BYTES / 2
    tracemalloc.start()
    try:
        started = time.process_time()
        with pytest.raises(ConfigError) as refused:
            NodesConfig.parse(data)
        assert time.process_time() - started < 5
        assert tracemalloc.get_traced_memory()[1] < 100 * MAX_FILE_BYTES
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 1000


@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_file_makes_the_reader_fail_in_another_way(data: bytes) -> None:
    read_or_refuse(data)


@given(changes=st.lists(st.tuples(PATHS, JSON), min_size=1, max_size=3))
def test_no_change_to_a_good_file_makes_the_reader_fail_in_another_way(
    changes: list[tuple[tuple[str | int, ...], Any]],
) -> None:
    try:
        data = changed(*changes)
    except (KeyError, TypeError, IndexError, AttributeError):
        return  # a change put another's place away
    read_or_refuse(data)


def read_or_refuse(data: bytes) -> None:
    try:
        config = NodesConfig.parse(data)
        for n_layers in (1, 28):
            config.check_layers(n_layers)
        config.node(0)
    except ConfigError as error:
        str(error).encode()  # can be printed
    else:
        assert len({one.address for one in config.all}) == len(config.all)
