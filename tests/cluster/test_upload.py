"""Manual nodes without weights: the starter sends them, whatever happens meanwhile."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from testing.checkpoints import tiny_config
from testing.manual_cluster import NODES, ManualCluster, on_loopback
from testing.processes import Process
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.locks import Hold
from mdi.checkpoint.manifest import Manifest, chunk_file
from mdi.checkpoint.prepare import Chunks, prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.cluster.launchers.manual import ManualLauncher
from mdi.cluster.monitor import Monitor
from mdi.cluster.nodes_config import NodesConfig
from mdi.core.config import ManualNodes
from mdi.core.errors import LinkError

PROMPT, PARAMS = "Who are you?", SamplingParams(max_tokens=8, temperature=1, seed=38)  # an answer that prints as it is
QUESTION = (PROMPT, "--max-tokens", "8", "--temperature", "1", "--seed", "38")
SLOW = 4e6  # bytes a second: a chunk takes some seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, but with chunks of many pieces for three nodes."""
    path = tmp_path_factory.mktemp("weights") / "wide"
    write_random_checkpoint(path, tiny_config(intermediate_size=16384))
    prepare(open_source(path), 3)
    return path


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> str:
    """What one process answers."""
    with Engine(checkpoint) as engine:
        return engine.chat(PROMPT, PARAMS).text


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def cluster(
    folder: Path, undo: ExitStack, *, encrypted: bool = False, slow_bytes_per_s: float | None = None
) -> ManualCluster:
    """Two nodes without weights, none of them running."""
    places = on_loopback(*NODES)
    return undo.enter_context(ManualCluster(folder, places, encrypted=encrypted, slow_bytes_per_s=slow_bytes_per_s))


def chunks(checkpoint: Path) -> Path:
    return checkpoint / "chunks" / "3nodes"


def size(checkpoint: Path, name: str) -> int:
    return (chunks(checkpoint) / chunk_file(name)).stat().st_size


def kept(nodes: ManualCluster, name: str, manifest: Manifest) -> Path:
    return nodes.cache(name) / manifest.digest / chunk_file(name)


def arrived(nodes: ManualCluster, name: str) -> int:
    """Bytes of a chunk on its way."""
    return sum(part.stat().st_size for part in nodes.cache(name).glob("*/.*.part"))


def asked(checkpoint: Path, nodes: ManualCluster) -> str:
    """The answer of a starter in this process, which starts faster than a command."""
    certs = nodes.certs("starter")
    with Engine(checkpoint, nodes_config=nodes.config, wait_s=100, encryption=nodes.encrypted, certs=certs) as engine:
        return engine.chat(PROMPT, PARAMS).text


def answer(starter: Process) -> str:
    """Of an `ask` that ends well."""
    assert starter.popen.stdout
    text = starter.popen.stdout.read()
    assert starter.popen.wait(60) == 0, "".join(starter.lines)
    return text.removesuffix("\n")


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_nodes_without_weights_get_them_and_have_them_next_time(
    checkpoint: Path, alone: str, tmp_path: Path, undo: ExitStack, encrypted: bool
) -> None:
    nodes = cluster(tmp_path, undo, encrypted=encrypted)
    manifest = Manifest.read(chunks(checkpoint))
    processes = list(nodes.start_all().values())
    starter = nodes.ask(checkpoint, *QUESTION)
    starter.wait_for_line("node finisher is there: receives its weights")
    assert answer(starter) == alone
    for name, node in zip(NODES, processes, strict=True):
        assert node.wait_for_line("receiving weights").startswith(
            f"receiving weights: {size(checkpoint, name) / 1e6:,.1f} of"
        )
        assert node.wait_for_line("loading: done")
        assert kept(nodes, name, manifest).read_bytes() == (chunks(checkpoint) / chunk_file(name)).read_bytes()
        node.popen.terminate()
        assert node.popen.wait(30) == 0
    again = list(nodes.start_all().values())
    assert asked(checkpoint, nodes) == alone
    assert not any("receiving" in line for node in again for line in node.lines)
    assert asked(checkpoint, nodes) == alone
    assert [line.count("loading: done") for node in again for line in ["".join(node.lines)]] == [1, 1]


def test_a_node_killed_in_mid_transfer_goes_on_where_its_file_ended(
    checkpoint: Path, alone: str, tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo, encrypted=True, slow_bytes_per_s=SLOW)
    processes = list(nodes.start_all().values())
    starter = nodes.ask(checkpoint, *QUESTION)
    wait_for(lambda: min(arrived(nodes, name) for name in NODES) > 2e6)  # both at the same time
    processes[0].kill()
    before = arrived(nodes, "secondary0")
    assert 2e6 < before < size(checkpoint, "secondary0")
    assert "is awaited" in starter.wait_for_line("node secondary0 is awaited: the link to node secondary0 broke")
    again = nodes.start("secondary0")
    to_go = float(again.wait_for_line("receiving weights").split()[2].replace(",", ""))
    assert to_go == pytest.approx((size(checkpoint, "secondary0") - before) / 1e6, abs=0.06)
    assert answer(starter) == alone
    assert processes[1].wait_for_line("loading: done")


def test_a_broken_link_and_a_starter_that_starts_again_go_on_where_they_were(
    checkpoint: Path, alone: str, tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo, slow_bytes_per_s=SLOW)
    processes = list(nodes.start_all().values())
    starter = nodes.ask(checkpoint, *QUESTION)
    wait_for(lambda: arrived(nodes, "finisher") > 2e6)
    nodes.links["finisher"].cut()
    starter.wait_for_line("node finisher is awaited: the link to node finisher broke while it was sent its weights")
    wait_for(lambda: arrived(nodes, "finisher") > 5e6)
    starter.kill()
    assert asked(checkpoint, nodes) == alone
    sent = sum(len(stream) for stream in nodes.links["finisher"].recorded)
    assert sent < 1.4 * size(checkpoint, "finisher")  # what was on its way when it broke is sent again, no more
    for node in processes:
        assert node.popen.poll() is None
        assert node.wait_for_line("loading: done")


def test_a_frozen_node_does_not_hold_the_starter_and_a_new_transfer_replaces_the_old(
    checkpoint: Path, alone: str, tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo, slow_bytes_per_s=SLOW)
    first, _ = nodes.start_all().values()
    starter = nodes.ask(checkpoint, *QUESTION)
    wait_for(lambda: arrived(nodes, "secondary0") > 2e6)
    first.popen.send_signal(signal.SIGSTOP)
    starter.wait_for_line("node secondary0 is awaited: the link to node secondary0 broke")
    first.popen.send_signal(signal.SIGCONT)
    assert answer(starter) == alone


def test_a_damaged_file_in_the_cache_is_replaced(checkpoint: Path, alone: str, tmp_path: Path, undo: ExitStack) -> None:
    nodes = cluster(tmp_path, undo)
    manifest = Manifest.read(chunks(checkpoint))
    damaged, half = (kept(nodes, name, manifest) for name in NODES)
    for path in (damaged, half):
        path.parent.mkdir(parents=True)
    good = [(chunks(checkpoint) / chunk_file(name)).read_bytes() for name in NODES]
    damaged.write_bytes(good[0][:-1] + bytes([good[0][-1] ^ 1]))
    half.with_name(f".{half.name}.part").write_bytes(bytes(10_000_000))  # a disk that lost what was written
    processes = list(nodes.start_all().values())
    assert asked(checkpoint, nodes) == alone
    for node in processes:
        assert "it is removed, and is sent again" in node.wait_for_line(
            "is damaged: its checksum is not the manifest's"
        )
    assert [path.read_bytes() for path in (damaged, half)] == good


def test_a_chunk_of_another_plan_is_replaced_by_the_right_one(
    checkpoint: Path, alone: str, tmp_path: Path, undo: ExitStack
) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other", ignore=shutil.ignore_patterns("chunks"))
    wrong = prepare(open_source(other), 3, layers=(1, 4, 1)) / chunk_file("secondary0")
    right = shutil.copytree(chunks(checkpoint), tmp_path / "right") / chunk_file("finisher")
    nodes = cluster(tmp_path, undo)
    replaced = nodes.start("secondary0", "--chunk", wrong)
    kept_one = nodes.start("finisher", "--chunk", right)
    replaced.wait_for_line("loading: done")
    assert asked(checkpoint, nodes) == alone
    assert replaced.wait_for_line("receiving weights: done")
    assert wrong.exists()
    assert not any("receiving" in line for line in kept_one.lines)
    assert not nodes.cache("finisher").exists()


def test_a_checkpoint_that_changed_is_sent_anew_to_nodes_that_hold_the_old_one(
    checkpoint: Path, alone: str, tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo)
    changed = tmp_path / "changed"
    write_random_checkpoint(changed, tiny_config(intermediate_size=1024), seed=1)
    processes = list(nodes.start_all().values())
    assert asked(checkpoint, nodes) == alone
    assert asked(changed, nodes) != alone
    assert asked(checkpoint, nodes) == alone
    assert [line.count("receiving weights: done") for node in processes for line in ["".join(node.lines)]] == [2, 2]


def test_a_chunk_that_is_damaged_on_the_starter_is_named_there(
    checkpoint: Path, tmp_path: Path, undo: ExitStack
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    file = chunks(copy) / chunk_file("finisher")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    nodes = cluster(tmp_path, undo)
    processes = list(nodes.start_all().values())
    starter = nodes.ask(copy, *QUESTION)
    assert starter.popen.wait(120) == 1
    said = starter.wait_for_line("error:")
    assert "node finisher was sent weights that are not what the manifest says" in said
    assert f"is '{file}' damaged here? Run `mdi prepare` again" in said
    assert processes[1].popen.poll() is None
    file.write_bytes(data[:-5])
    assert "model_finisher.safetensors changed since this server began" in (
        (ended := nodes.ask(copy, *QUESTION)).wait_for_line("error:")
    )
    assert ended.popen.wait(60) == 2


def test_a_full_disk_is_named_at_both_ends_and_the_transfer_goes_on_when_there_is_room(
    checkpoint: Path, alone: str, tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo)
    nodes.start("secondary0")
    finisher = nodes.start("finisher")
    disk = psutil.Process(finisher.popen.pid)
    disk.rlimit(psutil.RLIMIT_FSIZE, (10_000_000, psutil.RLIM_INFINITY))
    starter = nodes.ask(checkpoint, *QUESTION)
    remedy = "choose another folder with --cache-folder"
    assert remedy in starter.wait_for_line("node finisher is awaited: node finisher: the chunk cannot be kept")
    assert remedy in finisher.wait_for_line("cannot be written (File too large)")
    assert arrived(nodes, "finisher") == 10_000_000
    disk.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    assert answer(starter) == alone


def test_weights_that_need_longer_than_requests_may_wait_are_named_and_go_on_later(
    checkpoint: Path, tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo, slow_bytes_per_s=SLOW / 2)
    manifest = Manifest.read(chunks(checkpoint))
    nodes.start("secondary0", "--chunk", chunks(checkpoint) / chunk_file("secondary0"))
    finisher = nodes.start("finisher", "--chunk", chunks(checkpoint) / chunk_file("finisher"))
    config = NodesConfig.read(nodes.config)
    monitor = Monitor(None)
    undo.callback(monitor.close)
    launcher = ManualLauncher(
        config, ManualNodes(wait_s=100), monitor, Chunks(chunks(checkpoint), manifest, Hold(chunks(checkpoint)))
    )
    launcher.start()
    finisher.kill()
    nodes.start("finisher").wait_for_line("listens")
    with pytest.raises(LinkError, match="finisher: receives its weights, and needs more time: see --recovery-timeout"):
        launcher.restart(["finisher"], 6)
    assert 0 < arrived(nodes, "finisher") < size(checkpoint, "finisher")
    launcher.restart(["finisher"], 100)
    assert kept(nodes, "finisher", manifest).stat().st_size == size(checkpoint, "finisher")
    assert nodes.links["finisher"].passed_bytes < 1.4 * size(checkpoint, "finisher")
