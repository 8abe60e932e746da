"""What tests of many rooms share: seeds, a tiny checkpoint, a photograph, and a check that all processes ended."""

from __future__ import annotations

import io
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from PIL import Image
from skimage import data
from testing.checkpoints import tiny_config
from testing.processes import node_processes

from mdi.checkpoint.random_weights import write_random_checkpoint

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")
torch.set_num_threads(1)  # tests run side by side
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else processes that tests start would ignore Ctrl-C
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ.pop("COLUMNS", None)  # of the worker: consoles would keep it, whatever a test sets

LONGEST = (  # files whose slow tests take minutes begin first: one at the end would leave the other workers idle
    "tests/test_benchmarks.py",
    "tests/cluster/test_spares.py",
    "tests/cluster/test_replicas.py",
    "tests/cluster/test_upload.py",
    "tests/cluster/test_hosts.py",
    "tests/kernels/test_products.py",
    "tests/clients/test_clients.py",
    "tests/field/test_document.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Unseeded draws of torch are the same in every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _access_log_as_before() -> Iterator[None]:
    """`mdi serve` turns it on for its process, which tests share."""
    log = logging.getLogger("mdi.access")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL of six layers with random weights, byte-level tokenizer and chat template."""
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_config())


@pytest.fixture(scope="session")
def photograph() -> bytes:
    """A real photograph, 224 x 168 pixels, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(data.coffee()).resize((224, 168)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def no_process_left() -> Iterator[None]:
    yield
    assert node_processes() == []
